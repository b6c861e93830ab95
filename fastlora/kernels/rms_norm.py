"""RMSNorm with a frozen weight, forward and backward: a program handles whole rows, one pass over memory.

    n = h / sqrt(mean(h^2) + eps)      x = w n
    dn = w dx                          dh = residual + (dn - n mean(n dn)) / sqrt(mean(h^2) + eps)

The residual sum before the norm rides along in the forward (``add``), the residual's gradient in the backward, and the
backward can give ``x`` again, so that nobody keeps it. Rows may be columns of a wider buffer. Source: Zhang and Sennrich, "Root mean square layer normalization" (2019).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.row_tables import norm_tile, reads_again
from fastlora.kernels.rows import check_rows, norm_factor, norm_scaled, ready, row_stride, rows_ready


@triton.jit(do_not_specialize=["M"])
def norm_forward_kernel(
    p_h, p_add, p_w, p_x, p_rstd, p_total, M, eps, scale,
    H_LD: tl.constexpr, X_LD: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, STYLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """p_h [M, H_LD], p_x [M, X_LD]: their first K columns; p_add, p_total [M, K]; p_w [K]; p_rstd fp32 [M]. total = h + scale * add, each step rounded to the dtype."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m, m_k = o_m < M, o_k < K
    m_h = m_m[:, None] & m_k[None, :]
    o_h = o_m[:, None] * K + o_k[None, :]
    b_h = tl.load(p_h + o_m[:, None] * H_LD + o_k[None, :], mask=m_h, other=0.0)
    if ADD:
        b_add = tl.load(p_add + o_h, mask=m_h, other=0.0)
        if SCALED:
            b_add = (b_add.to(tl.float32) * scale).to(b_h.dtype)
        b_h = (b_h.to(tl.float32) + b_add.to(tl.float32)).to(b_h.dtype)
        tl.store(p_total + o_h, b_h, mask=m_h)
    b_w = norm_factor(tl.load(p_w + o_k, mask=m_k, other=0.0), STYLE)
    b_f = b_h.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_f * b_f, 1) * (1.0 / K) + eps)
    tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    tl.store(p_x + o_m[:, None] * X_LD + o_k[None, :], norm_scaled(b_f * b_rstd[:, None], b_w[None, :], STYLE, b_h.dtype), mask=m_h)


@triton.jit(do_not_specialize=["M"])
def norm_backward_kernel(
    p_dx, p_h, p_rstd, p_w, p_residual, p_dh, p_x, M,
    DX_LD: tl.constexpr, H_LD: tl.constexpr, DH_LD: tl.constexpr, K: tl.constexpr, RESIDUAL: tl.constexpr, EMIT: tl.constexpr,
    STYLE: tl.constexpr, AGAIN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """p_dx [M, DX_LD], p_h [M, H_LD], p_dh [M, DH_LD]: their first K columns; p_residual, p_x [M, K]; p_rstd fp32 [M]; p_w [K].

    dh is summed in fp32 and rounded once. p_dh may be p_dx: a program reads its rows before it writes them.

    AGAIN: rows too long to stay in registers are read once more (from cache) after the mean.
    """
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m, m_k = o_m < M, o_k < K
    m_h = m_m[:, None] & m_k[None, :]
    o_x = o_m[:, None] * K + o_k[None, :]
    o_h = o_m[:, None] * H_LD + o_k[None, :]
    o_dx = o_m[:, None] * DX_LD + o_k[None, :]
    b_h = tl.load(p_h + o_h, mask=m_h, other=0.0)
    b_dx = tl.load(p_dx + o_dx, mask=m_h, other=0.0)
    b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)[:, None]
    b_w = norm_factor(tl.load(p_w + o_k, mask=m_k, other=0.0), STYLE)[None, :]
    if RESIDUAL and not AGAIN:
        b_residual = tl.load(p_residual + o_x, mask=m_h, other=0.0)
    b_n = b_h.to(tl.float32) * b_rstd
    b_dn = b_dx.to(tl.float32) * b_w
    b_mean = tl.sum(b_n * b_dn, 1) * (1.0 / K)
    if EMIT:
        tl.store(p_x + o_x, norm_scaled(b_n, b_w, STYLE, b_h.dtype), mask=m_h)
    if AGAIN:
        # another eviction policy, or the compiler would merge these loads with the first
        b_h = tl.load(p_h + o_h, mask=m_h, other=0.0, eviction_policy="evict_first")
        b_dx = tl.load(p_dx + o_dx, mask=m_h, other=0.0, eviction_policy="evict_first")
        b_w = norm_factor(tl.load(p_w + o_k, mask=m_k, other=0.0, eviction_policy="evict_last"), STYLE)[None, :]
        b_n = b_h.to(tl.float32) * b_rstd
        b_dn = b_dx.to(tl.float32) * b_w
        if RESIDUAL:
            b_residual = tl.load(p_residual + o_x, mask=m_h, other=0.0)
    b_dh = (b_dn - b_n * b_mean[:, None]) * b_rstd
    if RESIDUAL:
        b_dh += b_residual.to(tl.float32)
    tl.store(p_dh + o_m[:, None] * DH_LD + o_k[None, :], b_dh.to(b_h.dtype), mask=m_h)


def norm_forward(h, weight, eps, style, *, add=None, scale=1.0, into=None):
    """(x [M, K], rstd fp32 [M], total [M, K]): RMSNorm of h, or of the residual sum total = h + scale * add.

    Args:
        h: [M, K], any row stride; weight: [K]; style: of ``ops.rms_norm.STYLES``, which says where x is rounded.
        add: [M, K] or None (then total is h). scale * add is rounded to the dtype, then the sum (in fp32 the compiler may fuse
            the two); the norm reads the rounded sum.
        into: where x goes, [M, K], any row stride, beginning at a 16-byte line; None: a new tensor.

    Raises:
        InputError: ``into`` cannot be written in place.
    """
    h, weight = rows_ready(h), ready(weight)
    rows, width = h.shape
    added = add is not None
    add = ready(add) if added else h
    x = _target(into, h)
    rstd = torch.empty(rows, device=h.device, dtype=torch.float32)
    total = torch.empty_like(add) if added else h
    if rows:
        tile = norm_tile(launch.arch_of(h), h.dtype, width)
        launch.run(
            norm_forward_kernel, (launch.cdiv(rows, tile.bm),), tile,
            h, add, weight, x, rstd, total, rows, float(eps), float(scale),
            H_LD=row_stride(h), X_LD=row_stride(x), K=width, ADD=added, SCALED=float(scale) != 1.0, STYLE=style, BM=tile.bm, BK=tile.bk,
        )
    return x, rstd, total


def _target(into, h) -> torch.Tensor:
    """``into``, checked, or a new tensor of h's shape."""
    if into is None:
        return torch.empty(h.shape, device=h.device, dtype=h.dtype)
    check_rows("into", into, h.shape[1])
    return into


def norm_backward(dx, h, rstd, weight, style, *, residual=None, emit=False, into=None):
    """(dh [M, K], x [M, K] or None): dh = residual + the norm's gradient, summed in fp32 and rounded once.

    Args:
        dx: [M, K], the gradient of x; h: [M, K], what was normalised (``total``), both of any row stride; rstd: fp32 [M] as the forward
            gave it.
        residual: [M, K] or None, a gradient of h from elsewhere.
        emit: also give x again, bit-equal to the forward's.
        into: where dh goes, as in :func:`norm_forward`; it may be dx.

    Raises:
        InputError: ``into`` cannot be written in place.
    """
    dx, h, weight = rows_ready(dx), rows_ready(h), ready(weight)
    rows, width = h.shape
    dh = _target(into, h)
    x = _target(None, h) if emit else None
    if rows:
        tile = norm_tile(launch.arch_of(h), h.dtype, width)
        launch.run(
            norm_backward_kernel, (launch.cdiv(rows, tile.bm),), tile,
            dx, h, ready(rstd), weight, h if residual is None else ready(residual), dh, x if emit else dh, rows,
            DX_LD=row_stride(dx), H_LD=row_stride(h), DH_LD=row_stride(dh), K=width, RESIDUAL=residual is not None, EMIT=emit,
            STYLE=style, AGAIN=reads_again(h.dtype, width), BM=tile.bm, BK=tile.bk,
        )
    return dh, x
