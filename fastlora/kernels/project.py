"""Skinny product: S = scale * D(x) A^T (and, at high rank, dS = scale * dY B): one pass over the wide operand.

One program owns BM rows and walks the whole feature axis; there is no split, so each element has one order of
arithmetic, fixed by (features, rank, dtype, tile row).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tile import keep_mask


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def project_kernel(
    p_x, p_w, p_s, p_token, M, scale, seed: tl.int64, threshold: tl.int64, keep_scale,
    F: tl.constexpr, R: tl.constexpr, W_R: tl.constexpr, W_F: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):
    """p_x [M, F] row-major; p_w element (rank, feature) at rank * W_R + feature * W_F; p_s [M, R]."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    m_m = o_m < M
    b_acc = tl.zeros((BM, R), dtype=tl.float32)
    if DROPOUT:
        b_token = tl.load(p_token + o_m, mask=m_m, other=0)
    for i_f in range(0, F, BF):
        o_f = i_f + tl.arange(0, BF)
        m_f = o_f < F
        b_x = tl.load(p_x + o_m[:, None] * F + o_f[None, :], mask=m_m[:, None] & m_f[None, :], other=0.0)
        b_w = tl.load(p_w + o_r[None, :] * W_R + o_f[:, None] * W_F, mask=m_f[:, None], other=0.0)
        if DROPOUT:
            b_keep = keep_mask(b_token, i_f, seed, threshold, BM, BF)
            b_x = tl.where(b_keep, b_x.to(tl.float32) * keep_scale, 0.0).to(b_x.dtype)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    tl.store(
        p_s + o_m[:, None] * R + o_r[None, :], (b_acc * scale).to(p_s.dtype.element_ty), mask=m_m[:, None]
    )


def project(x, weight, scale, dropout=None, *, transposed=False):
    """S = scale * D(x) weight^T.

    Args:
        x: [M, F], contiguous.
        weight: [R, F] (or [F, R] with ``transposed``), contiguous, dtype of x; R a padded rank.
        scale: float.
        dropout: None, or :class:`fastlora.kernels.launch.Dropout`.

    Returns:
        [M, R] in x's dtype, rounded once from fp32.
    """
    rows, features = x.shape
    rank = weight.shape[1] if transposed else weight.shape[0]
    out = torch.empty(rows, rank, device=x.device, dtype=x.dtype)
    if rows == 0:
        return out
    tile = launch.project_tile(launch.arch_of(x), x.dtype, rank)
    drop = launch.dropout_arguments(dropout, x)
    launch.run(
        project_kernel, (launch.cdiv(rows, tile.bm),), tile,
        x, weight, out, drop.tokens, rows, float(scale), drop.seed, drop.threshold, drop.keep_scale,
        F=features, R=rank, W_R=1 if transposed else features, W_F=rank if transposed else 1,
        DROPOUT=drop.active, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", BM=tile.bm, BF=tile.bk,
    )
    return out
