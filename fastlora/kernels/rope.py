"""Rotary position embedding in place, and the RMSNorm of every head before it (Qwen3, Gemma 3): one pass over memory.

Of a head's D features the first R turn, in halves of R / 2 as transformers' rotate_half pairs them; the other D - R pass:

    y1 = x1 c1 - x2 s1      y2 = x2 c2 + x1 s2      (c, s of the first and of the second half)
    dx1 = dy1 c1 + dy2 s2   dx2 = dy2 c2 - dy1 s1

All in fp32, rounded once at the end (the norm's own roundings are those of ops/rms_norm.py). A program handles some heads of one
token. Source: Su et al., "RoFormer" (2021).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.errors import InputError
from fastlora.kernels import launch
from fastlora.kernels.row_tables import head_tile, power_of_two
from fastlora.kernels.rows import check_rows, norm_factor, norm_scaled, ready, row_stride


@triton.jit
def half_angles(p, i_m, HALF: tl.constexpr, BD: tl.constexpr):
    """Both halves of a token's cos or sin, fp32 [1, BD] each, from p [M, 2 HALF]."""
    o_d = tl.arange(0, BD)
    b_1 = tl.load(p + i_m * 2 * HALF + o_d, mask=o_d < HALF, other=0.0)
    b_2 = tl.load(p + i_m * 2 * HALF + HALF + o_d, mask=o_d < HALF, other=0.0)
    return b_1.to(tl.float32)[None, :], b_2.to(tl.float32)[None, :]


@triton.jit
def head_factor(p_wq, p_wk, m_q, o_d, m_d, STYLE: tl.constexpr):
    """The norm's factor fp32 [heads, features]: the query heads' weight where m_q, else the key heads'."""
    b_q = tl.load(p_wq + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(p_wk + o_d, mask=m_d, other=0.0).to(tl.float32)
    return norm_factor(tl.where(m_q[:, None], b_q[None, :], b_k[None, :]), STYLE)


@triton.jit
def rope_kernel(
    p_x, p_cos, p_sin, LD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCKS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """p_x [M, LD], heads first, turned in place; p_cos, p_sin [M, 2 HALF]. A thread reads what it writes, before it."""
    i = tl.program_id(0)
    i_m = (i // BLOCKS).to(tl.int64)
    o_h = (i % BLOCKS) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    m = (o_h < HEADS)[:, None] & (o_d < HALF)[None, :]
    p_1 = p_x + i_m * LD + o_h[:, None] * D + o_d[None, :]
    p_2 = p_1 + HALF
    b_x1 = tl.load(p_1, mask=m, other=0.0)
    b_x2 = tl.load(p_2, mask=m, other=0.0)
    b_c1, b_c2 = half_angles(p_cos, i_m, HALF, BD)
    b_s1, b_s2 = half_angles(p_sin, i_m, HALF, BD)
    b_f1, b_f2 = b_x1.to(tl.float32), b_x2.to(tl.float32)
    if INVERSE:
        b_y1, b_y2 = b_f1 * b_c1 + b_f2 * b_s2, b_f2 * b_c2 - b_f1 * b_s1
    else:
        b_y1, b_y2 = b_f1 * b_c1 - b_f2 * b_s1, b_f2 * b_c2 + b_f1 * b_s2
    tl.store(p_1, b_y1.to(b_x1.dtype), mask=m)
    tl.store(p_2, b_y2.to(b_x1.dtype), mask=m)


@triton.jit
def head_norm_forward_kernel(
    p_raw, p_wq, p_wk, p_cos, p_sin, p_out, p_rstd, eps,
    LD: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, STYLE: tl.constexpr,
    BLOCKS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """p_raw [M, LD]; p_wq, p_wk [D]; p_out [M, HEADS * D]; p_rstd fp32 [M, HEADS]. The first Q heads are queries."""
    i = tl.program_id(0)
    i_m = (i // BLOCKS).to(tl.int64)
    o_h = (i % BLOCKS) * BH + tl.arange(0, BH)
    m_h, m_q = o_h < HEADS, o_h < Q
    b_square = tl.zeros((BH,), tl.float32)
    if HALF > 0:
        o_d = tl.arange(0, BD)
        m_d = o_d < HALF
        m_1 = m_h[:, None] & m_d[None, :]
        o_1 = o_h[:, None] * D + o_d[None, :]
        b_x1 = tl.load(p_raw + i_m * LD + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_x2 = tl.load(p_raw + i_m * LD + HALF + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_square += tl.sum(b_x1 * b_x1 + b_x2 * b_x2, 1)
    if D > 2 * HALF:
        o_r = 2 * HALF + tl.arange(0, BR)
        m_r = m_h[:, None] & (o_r < D)[None, :]
        o_x = o_h[:, None] * D + o_r[None, :]
        b_x = tl.load(p_raw + i_m * LD + o_x, mask=m_r, other=0.0).to(tl.float32)
        b_square += tl.sum(b_x * b_x, 1)
    b_rstd = tl.rsqrt(b_square * (1.0 / D) + eps)
    tl.store(p_rstd + i_m * HEADS + o_h, b_rstd, mask=m_h)
    p_out += i_m * HEADS * D
    if HALF > 0:
        b_w1 = head_factor(p_wq, p_wk, m_q, o_d, m_d, STYLE)
        b_w2 = head_factor(p_wq, p_wk, m_q, o_d + HALF, m_d, STYLE)
        b_n1 = norm_scaled(b_x1 * b_rstd[:, None], b_w1, STYLE, p_out.dtype.element_ty).to(tl.float32)
        b_n2 = norm_scaled(b_x2 * b_rstd[:, None], b_w2, STYLE, p_out.dtype.element_ty).to(tl.float32)
        b_c1, b_c2 = half_angles(p_cos, i_m, HALF, BD)
        b_s1, b_s2 = half_angles(p_sin, i_m, HALF, BD)
        tl.store(p_out + o_1, (b_n1 * b_c1 - b_n2 * b_s1).to(p_out.dtype.element_ty), mask=m_1)
        tl.store(p_out + HALF + o_1, (b_n2 * b_c2 + b_n1 * b_s2).to(p_out.dtype.element_ty), mask=m_1)
    if D > 2 * HALF:
        b_w = head_factor(p_wq, p_wk, m_q, o_r, o_r < D, STYLE)
        tl.store(p_out + o_x, norm_scaled(b_x * b_rstd[:, None], b_w, STYLE, p_out.dtype.element_ty), mask=m_r)


@triton.jit
def head_norm_backward_kernel(
    p_grad, p_raw, p_rstd, p_wq, p_wk, p_cos, p_sin,
    GRAD_LD: tl.constexpr, LD: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    STYLE: tl.constexpr, BLOCKS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """p_grad [M, GRAD_LD]: gradient of the rotated heads, overwritten by that of p_raw [M, LD]; the rest as in the forward."""
    i = tl.program_id(0)
    i_m = (i // BLOCKS).to(tl.int64)
    o_h = (i % BLOCKS) * BH + tl.arange(0, BH)
    m_h, m_q = o_h < HEADS, o_h < Q
    b_rstd = tl.load(p_rstd + i_m * HEADS + o_h, mask=m_h, other=0.0)[:, None]
    p_grad += i_m * GRAD_LD
    p_raw += i_m * LD
    b_dot = tl.zeros((BH,), tl.float32)
    if HALF > 0:
        o_d = tl.arange(0, BD)
        m_d = o_d < HALF
        m_1 = m_h[:, None] & m_d[None, :]
        o_1 = o_h[:, None] * D + o_d[None, :]
        b_g1 = tl.load(p_grad + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_g2 = tl.load(p_grad + HALF + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_n1 = tl.load(p_raw + o_1, mask=m_1, other=0.0).to(tl.float32) * b_rstd
        b_n2 = tl.load(p_raw + HALF + o_1, mask=m_1, other=0.0).to(tl.float32) * b_rstd
        b_c1, b_c2 = half_angles(p_cos, i_m, HALF, BD)
        b_s1, b_s2 = half_angles(p_sin, i_m, HALF, BD)
        b_d1 = (b_g1 * b_c1 + b_g2 * b_s2) * head_factor(p_wq, p_wk, m_q, o_d, m_d, STYLE)
        b_d2 = (b_g2 * b_c2 - b_g1 * b_s1) * head_factor(p_wq, p_wk, m_q, o_d + HALF, m_d, STYLE)
        b_dot += tl.sum(b_n1 * b_d1 + b_n2 * b_d2, 1)
    if D > 2 * HALF:
        o_r = 2 * HALF + tl.arange(0, BR)
        m_r = m_h[:, None] & (o_r < D)[None, :]
        o_x = o_h[:, None] * D + o_r[None, :]
        b_n = tl.load(p_raw + o_x, mask=m_r, other=0.0).to(tl.float32) * b_rstd
        b_d = tl.load(p_grad + o_x, mask=m_r, other=0.0).to(tl.float32)
        b_d *= head_factor(p_wq, p_wk, m_q, o_r, o_r < D, STYLE)
        b_dot += tl.sum(b_n * b_d, 1)
    b_mean = (b_dot * (1.0 / D))[:, None]
    if HALF > 0:
        tl.store(p_grad + o_1, ((b_d1 - b_n1 * b_mean) * b_rstd).to(p_grad.dtype.element_ty), mask=m_1)
        tl.store(p_grad + HALF + o_1, ((b_d2 - b_n2 * b_mean) * b_rstd).to(p_grad.dtype.element_ty), mask=m_1)
    if D > 2 * HALF:
        tl.store(p_grad + o_x, ((b_d - b_n * b_mean) * b_rstd).to(p_grad.dtype.element_ty), mask=m_r)


def _angles(cos, sin, rows: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """cos and sin made ready, and half the features that turn."""
    rotary = cos.shape[-1]
    if rotary % 2 or rotary > head_dim or cos.shape != sin.shape or cos.numel() != rows * rotary:
        raise InputError(
            f"cos, sin: shapes {tuple(cos.shape)}, {tuple(sin.shape)}; need [{rows}, R], R even and at most head_dim {head_dim}"
        )
    return ready(cos), ready(sin), rotary // 2


def _blocks(tensor: torch.Tensor, heads: int, head_dim: int, half: int):
    """(tile, constants) for ``heads`` heads of one token, of which 2 ``half`` features turn."""
    tile = head_tile(launch.arch_of(tensor), tensor.dtype, heads, head_dim)
    rest = head_dim - 2 * half
    return tile, dict(BLOCKS=launch.cdiv(heads, tile.bm), BH=tile.bm, BD=power_of_two(half), BR=power_of_two(rest))


def rotate(buffer, cos, sin, heads, head_dim, *, inverse=False) -> None:
    """Turn columns [0, heads * head_dim) of ``buffer`` [M, LD] in place.

    Args:
        buffer: contiguous last axis, any row stride, beginning at a 16-byte line.
        cos, sin: [M, R] (leading axes of size 1 allowed), any float dtype, R even and at most head_dim.
        inverse: apply the transpose instead (the backward).

    Raises:
        InputError: a buffer that cannot be written in place, or angles of another shape.
    """
    check_rows("buffer", buffer, heads * head_dim)
    rows = buffer.shape[0]
    cos, sin, half = _angles(cos, sin, rows, head_dim)
    if not rows or not half:
        return
    tile, blocks = _blocks(buffer, heads, head_dim, half)
    del blocks["BR"]
    launch.run(
        rope_kernel, (rows * blocks["BLOCKS"],), tile, buffer, cos, sin,
        LD=row_stride(buffer), HEADS=heads, D=head_dim, HALF=half, INVERSE=inverse, **blocks,
    )


def head_norm_rotate(raw, weight_q, weight_k, eps, style, cos, sin, q_heads, k_heads, head_dim):
    """(rotated [M, (q + k) * D], rstd fp32 [M, q + k]): RMSNorm of each head, then RoPE.

    Args:
        raw: [M, LD], query heads, then key heads, then anything; see :func:`rotate`. It is not changed.
        weight_q, weight_k: [D]; style: of ``ops.rms_norm.STYLES``.
        cos, sin: see :func:`rotate`; None for both: only the norm.
    """
    heads = q_heads + k_heads
    check_rows("raw", raw, heads * head_dim)
    rows = raw.shape[0]
    cos, sin, half = (raw, raw, 0) if cos is None else _angles(cos, sin, rows, head_dim)
    rotated = torch.empty(rows, heads * head_dim, device=raw.device, dtype=raw.dtype)
    rstd = torch.empty(rows, heads, device=raw.device, dtype=torch.float32)
    if rows:
        tile, blocks = _blocks(raw, heads, head_dim, half)
        launch.run(
            head_norm_forward_kernel, (rows * blocks["BLOCKS"],), tile,
            raw, ready(weight_q), ready(weight_k), cos, sin, rotated, rstd, float(eps),
            LD=row_stride(raw), Q=q_heads, HEADS=heads, D=head_dim, HALF=half, STYLE=style, **blocks,
        )
    return rotated, rstd


def head_norm_rotate_backward(drotated, raw, rstd, weight_q, weight_k, style, cos, sin, q_heads, k_heads, head_dim) -> None:
    """Overwrite the first (q + k) * D columns of ``drotated`` [M, LD'] by the gradient of ``raw``; arguments as in the forward."""
    heads = q_heads + k_heads
    check_rows("drotated", drotated, heads * head_dim)
    check_rows("raw", raw, heads * head_dim)
    rows = raw.shape[0]
    cos, sin, half = (raw, raw, 0) if cos is None else _angles(cos, sin, rows, head_dim)
    if rows:
        tile, blocks = _blocks(raw, heads, head_dim, half)
        launch.run(
            head_norm_backward_kernel, (rows * blocks["BLOCKS"],), tile,
            drotated, raw, ready(rstd), ready(weight_q), ready(weight_k), cos, sin,
            GRAD_LD=row_stride(drotated), LD=row_stride(raw), Q=q_heads, HEADS=heads, D=head_dim, HALF=half, STYLE=style,
            **blocks,
        )
