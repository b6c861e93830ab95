"""Causal attention inside tile-aligned documents: forward, and backward in two passes without atomics.

A document starts at a multiple of the block, so a block of queries (or keys) belongs to one document and a program walks only
that document's blocks: the one on the diagonal, then the others in order from the document's start (or, keys, to its end). Bits depend on the document alone: neither on its place in the stream, nor
on its neighbours, nor on the stream's length. dK and dV are summed over a group's query heads by one program in the order of heads,
dQ by another program over keys.

Source: Dao, "FlashAttention-2" (2023), online softmax and recomputed scores; order and layout are this library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import attention_specialized, attention_specialized_keys, launch
from fastlora.kernels.tables import attention_tile

LOG2E = tl.constexpr(1.4426950408889634)
# Whether dK and dV mask the blocks on the diagonal alone, by a second copy of the step; no bit depends on it. With Triton 3.6 that is
# fastest though it keeps 88 bytes in local memory (sm_90, H200, 32 heads of 128, 4 x 2048 tokens: 0.65 ms); 3.9 would keep 288.
MASKS_APART = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)


@triton.jit
def masked_scores(
    b_s, o_q, o_k, scale, window, softcap, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores from q k^T in units of log2, minus infinity where a query may not look; and d(score)/d(scaled q k^T) of the soft-cap.

    b_s may lie either way: o_q and o_k are the positions along its axes, [n, 1] and [1, m] or [1, n] and [m, 1]. MASK False: every
    query of the block looks at every key of it, so nothing is compared.
    """
    b_slope = b_s
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        b_t = 2.0 * tl.sigmoid(2.0 * (b_s * scale) / softcap) - 1.0
        b_s = softcap * b_t
        b_slope = 1.0 - b_t * b_t
    if MASK:
        m_s = o_q >= o_k
        if WINDOW:
            m_s = m_s & (o_q - o_k < window)
        b_s = tl.where(m_s, b_s, float("-inf"))
    # last, so that the compiler may join it with what is subtracted before the exponential
    if SOFTCAP:
        return b_s * LOG2E, b_slope
    return b_s * (scale * LOG2E), b_slope


@triton.jit
def forward_step(
    b_q, p_k, p_v, i_k, o_q, b_max, b_sum, b_acc, scale, window, softcap, K_T: tl.constexpr, V_T: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, sum and weighted values after it."""
    o_k = i_k + tl.arange(0, BK)
    b_k = load_rows(p_k, o_k, K_T, D, BD)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_s, _ = masked_scores(b_s, o_q[:, None], o_k[None, :], scale, window, softcap, MASK, WINDOW, SOFTCAP)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = b_new
    if MASK:
        # a row that has seen no key yet keeps minus infinity: subtract 0 there, not infinity from infinity
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_old = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_v = load_rows(p_v, o_k, V_T, E, BE)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_acc


@triton.jit
def dq_step(
    b_q, b_dout, b_lse, b_delta, p_k, p_v, i_k, o_q, b_dq, scale, window, softcap, K_T: tl.constexpr, V_T: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ (without the scale) after one block of keys."""
    o_k = i_k + tl.arange(0, BK)
    b_k = load_rows(p_k, o_k, K_T, D, BD)
    b_v = load_rows(p_v, o_k, V_T, E, BE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_s, b_slope = masked_scores(b_s, o_q[:, None], o_k[None, :], scale, window, softcap, MASK, WINDOW, SOFTCAP)
    b_p = tl.exp2(b_s - b_lse[:, None])
    b_ds = b_p * (tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    if SOFTCAP:
        b_ds = b_ds * b_slope
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def dkv_step(
    b_k, b_v, p_q, p_dout, p_lse, p_delta, i_q, o_k, b_dk, b_dv, scale, window, softcap, Q_T: tl.constexpr, DO_T: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """dK (without the scale) and dV after one block of queries.

    Scores are made keys by queries: so they are the left operand of both products from registers, without a way through shared
    memory (as in Triton's own tutorial of fused attention).
    """
    o_q = i_q + tl.arange(0, BQ)
    b_q = load_rows(p_q, o_q, Q_T, D, BD)
    b_dout = load_rows(p_dout, o_q, DO_T, E, BE)
    b_lse = tl.load(p_lse + o_q)
    b_delta = tl.load(p_delta + o_q)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_s, b_slope = masked_scores(b_s, o_q[None, :], o_k[:, None], scale, window, softcap, MASK, WINDOW, SOFTCAP)
    b_p = tl.exp2(b_s - b_lse[None, :])
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION) - b_delta[None, :])
    if SOFTCAP:
        b_ds = b_ds * b_slope
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def load_rows(p, o_t, stride, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] of a tensor whose last axis is contiguous; columns beyond D are zero."""
    o_d = tl.arange(0, BD)
    return tl.load(p + o_t.to(tl.int64)[:, None] * stride + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p, o_t, stride, b_value, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of :func:`load_rows`."""
    o_d = tl.arange(0, BD)
    p_rows = p + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_rows, b_value.to(p.dtype.element_ty), mask=(o_d < D)[None, :])


@triton.jit(do_not_specialize=["T", "window"])
def attention_forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_first, T, scale, window, softcap,
    Q_H: tl.constexpr, Q_T: tl.constexpr, K_H: tl.constexpr, K_T: tl.constexpr, V_H: tl.constexpr, V_T: tl.constexpr,
    O_H: tl.constexpr, O_T: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. p_first int32 [T / BQ]: where the block's document starts. p_lse fp32 [H, T], log2."""
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks first
    i_h = tl.program_id(1).to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    first = tl.load(p_first + i_q)
    if WINDOW:
        # the first block that holds a visible key, counted from the document's start
        first = tl.maximum(first, first + (i_q * BQ - first - window + 1) // BK * BK)
    b_q = load_rows(p_q + i_h * Q_H, o_q, Q_T, D, BD)
    p_k += i_h // GROUPS * K_H
    p_v += i_h // GROUPS * V_H
    b_max = tl.full((BQ,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BQ,), tl.float32)
    b_acc = tl.zeros((BQ, BE), tl.float32)
    for i_k in range(i_q * BQ, i_q * BQ + BQ, BK):
        b_max, b_sum, b_acc = forward_step(
            b_q, p_k, p_v, i_k, o_q, b_max, b_sum, b_acc, scale, window, softcap, K_T, V_T, D, E, True, WINDOW, SOFTCAP,
            PRECISION, BD, BE, BK,
        )
    # below the diagonal block nothing is masked, unless a window hides what lies far back
    for i_k in range(first, i_q * BQ, BK):
        b_max, b_sum, b_acc = forward_step(
            b_q, p_k, p_v, i_k, o_q, b_max, b_sum, b_acc, scale, window, softcap, K_T, V_T, D, E, WINDOW, WINDOW, SOFTCAP,
            PRECISION, BD, BE, BK,
        )
    store_rows(p_out + i_h * O_H, o_q, O_T, b_acc * (1.0 / b_sum)[:, None], E, BE)
    tl.store(p_lse + i_h * T + o_q, b_max + tl.log2(b_sum))


@triton.jit(do_not_specialize=["T"])
def attention_delta_kernel(
    p_out, p_dout, p_delta, T, O_H: tl.constexpr, O_T: tl.constexpr, DO_H: tl.constexpr, DO_T: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), fp32 [H, T]."""
    i_h = tl.program_id(1).to(tl.int64)
    o_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    b_out = load_rows(p_out + i_h * O_H, o_q, O_T, E, BE).to(tl.float32)
    b_dout = load_rows(p_dout + i_h * DO_H, o_q, DO_T, E, BE).to(tl.float32)
    tl.store(p_delta + i_h * T + o_q, tl.sum(b_out * b_dout, 1))


@triton.jit(do_not_specialize=["T", "window"])
def attention_dq_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dq, p_first, T, scale, window, softcap,
    Q_H: tl.constexpr, Q_T: tl.constexpr, K_H: tl.constexpr, K_T: tl.constexpr, V_H: tl.constexpr, V_T: tl.constexpr,
    DO_H: tl.constexpr, DO_T: tl.constexpr, DQ_H: tl.constexpr, DQ_T: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries: one walk over its document's keys."""
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks first
    i_h = tl.program_id(1).to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)
    first = tl.load(p_first + i_q)
    if WINDOW:
        first = tl.maximum(first, first + (i_q * BQ - first - window + 1) // BK * BK)
    b_q = load_rows(p_q + i_h * Q_H, o_q, Q_T, D, BD)
    b_dout = load_rows(p_dout + i_h * DO_H, o_q, DO_T, E, BE)
    b_lse = tl.load(p_lse + i_h * T + o_q)
    b_delta = tl.load(p_delta + i_h * T + o_q)
    p_k += i_h // GROUPS * K_H
    p_v += i_h // GROUPS * V_H
    b_dq = tl.zeros((BQ, BD), tl.float32)
    for i_k in range(i_q * BQ, i_q * BQ + BQ, BK):
        b_dq = dq_step(
            b_q, b_dout, b_lse, b_delta, p_k, p_v, i_k, o_q, b_dq, scale, window, softcap, K_T, V_T, D, E, True, WINDOW,
            SOFTCAP, PRECISION, BD, BE, BK,
        )
    for i_k in range(first, i_q * BQ, BK):
        b_dq = dq_step(
            b_q, b_dout, b_lse, b_delta, p_k, p_v, i_k, o_q, b_dq, scale, window, softcap, K_T, V_T, D, E, WINDOW, WINDOW,
            SOFTCAP, PRECISION, BD, BE, BK,
        )
    store_rows(p_dq + i_h * DQ_H, o_q, DQ_T, b_dq * scale, D, BD)


@triton.jit(do_not_specialize=["T", "window"])
def attention_dkv_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dk, p_dv, p_last, T, scale, window, softcap,
    Q_H: tl.constexpr, Q_T: tl.constexpr, K_H: tl.constexpr, K_T: tl.constexpr, V_H: tl.constexpr, V_T: tl.constexpr,
    DO_H: tl.constexpr, DO_T: tl.constexpr, DK_H: tl.constexpr, DK_T: tl.constexpr, DV_H: tl.constexpr,
    DV_T: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one key head. p_last int32 [T / BK]: where the block's document ends. APART: blocks below the
    diagonal are not masked."""
    i_k = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    last = tl.load(p_last + i_k)
    if WINDOW:
        last = tl.minimum(last, i_k * BK + (BK + window - 1 + BQ - 1) // BQ * BQ)
    b_k = load_rows(p_k + i_h * K_H, o_k, K_T, D, BD)
    b_v = load_rows(p_v + i_h * V_H, o_k, V_T, E, BE)
    b_dk = tl.zeros((BK, BD), tl.float32)
    b_dv = tl.zeros((BK, BE), tl.float32)
    for i_member in range(GROUPS):
        i_q_head = i_h * GROUPS + i_member
        p_query, p_dy = p_q + i_q_head * Q_H, p_dout + i_q_head * DO_H
        p_l, p_d = p_lse + i_q_head * T, p_delta + i_q_head * T
        first = i_k * BK
        if APART:
            for i_q in range(first, first + BK, BQ):
                b_dk, b_dv = dkv_step(
                    b_k, b_v, p_query, p_dy, p_l, p_d, i_q, o_k, b_dk, b_dv, scale, window, softcap, Q_T, DO_T, D, E, True, WINDOW,
                    SOFTCAP, PRECISION, BD, BE, BQ,
                )
            first += BK
        for i_q in range(first, last, BQ):
            b_dk, b_dv = dkv_step(
                b_k, b_v, p_query, p_dy, p_l, p_d, i_q, o_k, b_dk, b_dv, scale, window, softcap, Q_T, DO_T, D, E,
                WINDOW or not APART, WINDOW, SOFTCAP, PRECISION, BD, BE, BQ,
            )
    store_rows(p_dk + i_h * DK_H, o_k, DK_T, b_dk * scale, D, BD)
    store_rows(p_dv + i_h * DV_H, o_k, DV_T, b_dv, E, BE)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[H, T, D] with a contiguous last axis, rows of 16 bytes and an aligned start, else a copy."""
    good = tensor.stride(2) == 1 and all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:2])
    return tensor if good and tensor.data_ptr() % 16 == 0 else tensor.contiguous().clone()


def _tile(q: torch.Tensor, v: torch.Tensor, of: str):
    return attention_tile(launch.arch_of(q), q.dtype, max(q.shape[2], v.shape[2]), of=of)


def _strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    return {f"{prefix}_H": tensor.stride(0), f"{prefix}_T": tensor.stride(1)}


def _rule(q, v, k, window, softcap) -> tuple[dict, tuple]:
    """Constants and scalars that all kernels share."""
    head, value_head = q.shape[2], v.shape[2]
    constants = dict(
        GROUPS=q.shape[0] // k.shape[0], D=head, E=value_head, WINDOW=window is not None, SOFTCAP=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BD=launch.padded_rank(head), BE=launch.padded_rank(value_head),
    )  # fmt: skip
    return constants, (int(window or 0), float(softcap or 1.0))


def attention_forward(q, k, v, edges, scale, window=None, softcap=None):
    """(out [T, Hq, E], lse fp32 [Hq, T] in log2) of causal attention inside documents.

    Args:
        q: [Hq, T, D]; k: [Hk, T, D]; v: [Hk, T, E]; one dtype, any strides; Hk divides Hq; T a multiple of the block.
        edges: :class:`fastlora.kernels.edges.Edges`.
        scale, window, softcap: see ops/attention.py.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    heads, tokens = q.shape[0], q.shape[1]
    out = torch.empty(tokens, heads, v.shape[2], device=q.device, dtype=q.dtype)
    lse = torch.empty(heads, tokens, device=q.device, dtype=torch.float32)
    if tokens == 0:
        return out, lse
    view = out.transpose(0, 1)
    specialized = attention_specialized.serves(q, k, v, edges, window, softcap)
    if specialized and attention_specialized.forward(q, k, v, view, lse, edges, scale):
        return out, lse
    tile = _tile(q, v, "forward")
    constants, scalars = _rule(q, v, k, window, softcap)
    launch.run(
        attention_forward_kernel, (tokens // tile.bm, heads), tile,
        q, k, v, out, lse, edges.table[0], tokens, float(scale), *scalars,
        **_strides("Q", q), **_strides("K", k), **_strides("V", v), **_strides("O", view), **constants,
        BQ=tile.bm, BK=tile.bn,
    )
    return out, lse


def attention_backward(dout, q, k, v, out, lse, edges, scale, window=None, softcap=None, *, into=None):
    """(dq [Hq, T, D], dk [Hk, T, D], dv [Hk, T, E]) in q's dtype from dout [T, Hq, E]; written to the views ``into`` if given."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    dout = _rows(dout.transpose(0, 1))
    view = out.transpose(0, 1)
    heads, tokens = q.shape[0], q.shape[1]
    dq, dk, dv = into or (
        torch.empty(t.shape[1], t.shape[0], t.shape[2], device=q.device, dtype=q.dtype).transpose(0, 1) for t in (q, k, v)
    )
    if tokens == 0:
        return dq, dk, dv
    tile = _tile(q, v, "dq")
    constants, scalars = _rule(q, v, k, window, softcap)
    delta = torch.empty_like(lse)
    launch.run(
        attention_delta_kernel, (tokens // tile.bm, heads), tile, out, dout, delta, tokens,
        **_strides("O", view), **_strides("DO", dout), E=v.shape[2], BE=constants["BE"], BQ=tile.bm,
    )
    read = {**_strides("Q", q), **_strides("K", k), **_strides("V", v), **_strides("DO", dout)}
    specialized = attention_specialized.serves(q, k, v, edges, window, softcap, dout)
    if not (specialized and attention_specialized.backward_dq(dout, q, k, v, lse, delta, dq, edges, scale)):
        launch.run(
            attention_dq_kernel, (tokens // tile.bm, heads), tile,
            q, k, v, dout, lse, delta, dq, edges.table[0], tokens, float(scale), *scalars,
            **read, **_strides("DQ", dq), **constants, BQ=tile.bm, BK=tile.bn,
        )
    if specialized and attention_specialized_keys.backward_dkv(dout, q, k, v, lse, delta, dk, dv, edges, scale):
        return dq, dk, dv
    tile = _tile(q, v, "dkv")
    launch.run(
        attention_dkv_kernel, (tokens // tile.bn, k.shape[0]), tile,
        q, k, v, dout, lse, delta, dk, dv, edges.table[1], tokens, float(scale), *scalars,
        **read, **_strides("DK", dk), **_strides("DV", dv), **constants, BQ=tile.bm, BK=tile.bn, APART=MASKS_APART,
    )
    return dq, dk, dv
