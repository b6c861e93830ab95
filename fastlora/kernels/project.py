"""Skinny product: S = scale * D(x) A^T (and, at high rank, dS = scale * dY B) for the projections of one input, side by side: one pass
over the wide operand. S under dropout takes one a projection, whose masks differ; in dS each projection reads its own features.

One program owns BM rows and walks the whole feature axis; there is no split, so each element has one order of
arithmetic, fixed by (features, rank, dtype, tile row).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch, project_dropout
from fastlora.kernels.columns import starts_and_widths
from fastlora.kernels.tile import keep_mask


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def project_kernel(
    p_x, p_w, p_s, p_scale, p_token, M, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64, keep_scale,
    LD: tl.constexpr, LR: tl.constexpr, W_R: tl.constexpr, W_F: tl.constexpr, START0: tl.constexpr, START1: tl.constexpr,
    START2: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr, FIRST: tl.constexpr,
    USED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
):
    """p_x [M, LD] row-major; p_w element (column, feature) at column * W_R + feature * W_F; p_s [M, LR], of which a program fills C
    columns from FIRST on, zeros from USED on; p_scale fp32 [LR]. Under dropout C columns are those of one projection.

    A program reads the first F0 features, or with F1 > 0 those of its projection: F0 from START0 on, and so on, of a fourth none."""
    # projections first: where they share p_x, it is read once from memory
    i_p = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_c = FIRST + i_p * C + tl.arange(0, C)
    m_m = o_m < M
    b_acc = tl.zeros((BM, C), dtype=tl.float32)
    if DROPOUT:
        seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
        b_token = tl.load(p_token + o_m, mask=m_m, other=0)
    start = 0
    stop = F0
    if F1 > 0:
        start = tl.where(i_p == 0, START0, tl.where(i_p == 1, START1, START2))
        stop = start + tl.where(i_p == 0, F0, tl.where(i_p == 1, F1, tl.where(i_p == 2, F2, 0)))
    if USED < LR:
        stop = tl.where(FIRST + i_p * C < USED, stop, 0)
    for i_f in range(start, stop, BF):
        o_f = i_f + tl.arange(0, BF)
        m_f = o_f < stop
        b_x = tl.load(p_x + o_m[:, None] * LD + o_f[None, :], mask=m_m[:, None] & m_f[None, :], other=0.0)
        b_w = tl.load(p_w + o_c[None, :] * W_R + o_f[:, None] * W_F, mask=m_f[:, None], other=0.0)
        if DROPOUT:
            b_keep = keep_mask(b_token, i_f, seed, threshold, BM, BF)
            b_x = tl.where(b_keep, b_x.to(tl.float32) * keep_scale, 0.0).to(b_x.dtype)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    b_acc *= tl.load(p_scale + o_c)[None, :]
    tl.store(p_s + o_m[:, None] * LR + o_c[None, :], b_acc.to(p_s.dtype.element_ty), mask=m_m[:, None])


# Columns one program can hold beside its accumulator.
_MOST_COLUMNS = 256


def project(x, weight, layout, dropout=None, *, transposed=False):
    """S = scale * D(x) weight^T, or with ``transposed`` dS = scale * x weight.

    Args:
        x: [M, F], contiguous.
        weight: [R, F] (or [F, R] with ``transposed``, block-diagonal), contiguous, dtype of x; R = layout.columns.
        layout: :class:`fastlora.kernels.columns.Columns`.
        dropout: None, or :class:`fastlora.kernels.launch.Dropout`.

    Returns:
        [M, R] in x's dtype, rounded once from fp32.
    """
    rows, features = x.shape
    out = launch.empty(x, rows, layout.columns)
    if rows == 0:
        return out
    drop = launch.dropout_arguments(dropout, x)
    if dropout is not None and not transposed and project_dropout.run(x, weight, layout, out, drop):
        return out
    made, scales = _plan(rows, features, layout, transposed, dropout is not None, x.dtype, x.device)
    made(x, weight, out, scales, drop.tokens, rows, *drop.seeds, drop.threshold, drop.keep_scale)
    return out


def project_rest(x, weight, layout, out, first: int) -> None:
    """Fill ``out`` [M, R] from column ``first`` on as :func:`project` does, a projection at a time."""
    made, scales = _plan(*x.shape, layout, False, False, x.dtype, x.device, first)
    drop = launch.dropout_arguments(None, x)
    made(x, weight, out, scales, drop.tokens, x.shape[0], *drop.seeds, drop.threshold, drop.keep_scale)


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def _plan(rows, features, layout, transposed, dropout, dtype, device, first=0):
    """(launch, scale of each column): what the shape decides."""
    total = layout.columns
    # of a block-diagonal weight each projection reads its own features
    apart = transposed and layout.count > 1
    columns = layout.padded if apart or dropout or first else min(total, _MOST_COLUMNS)
    starts, widths = starts_and_widths(layout.ranges if apart else ((0, features),))
    tile = launch.project_tile(launch.arch_at(device), dtype, columns, apart=apart)
    made = launch.Launch(
        project_kernel, ((total - first) // columns, launch.cdiv(rows, tile.bm)), tile,
        LD=features, LR=total, W_R=1 if transposed else features, W_F=total if transposed else 1,
        START0=starts[0], START1=starts[1], START2=starts[2], F0=widths[0], F1=widths[1], F2=widths[2],
        FIRST=first, USED=layout.count * layout.padded if first else total,
        DROPOUT=dropout, PRECISION="ieee" if dtype == torch.float32 else "tf32", BM=tile.bm, BF=tile.bk, C=columns,
    )  # fmt: skip
    return made, layout.scale_of_columns(device)
