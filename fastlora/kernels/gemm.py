"""The one GEMM of forward and backward: out = x W' + D'(s B') + bias, the rank-r product in the epilogue.

Forward: Y = x W^T + S B^T + bias (W [N, K] transposed). Backward: dX = dY W + D'(dS A) (W as it lies). The
accumulator is one fp32 chain over K in steps of BK, then over the padded rank; one rounding at the end. Neither tile
height nor grid enters the order of an element's sum, so rows do not depend on M.

Three kinds: pointers for every GPU and shape; bulk tensor copies (TMA) and a persistent grid on compute capability 9.0 and later
when rows are multiples of 16 bytes; and on 9.0 the same with a warp that only loads (gemm_specialized.py, and gemm_dropout.py with
dropout in the epilogue).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastlora.kernels import gemm_dropout, gemm_specialized, launch
from fastlora.kernels.columns import single
from fastlora.kernels.tile import grouped_tile, keep_mask_of_product


@triton.jit
def low_rank_dropout(b_low, p_token, o_m, M, i_n, seed, threshold, keep_scale, BM: tl.constexpr, BN: tl.constexpr):
    """D'(dS A): the backward of dropout, on the fp32 rank-r product."""
    b_token = tl.load(p_token + o_m, mask=o_m < M, other=0)
    b_keep = keep_mask_of_product(b_token, i_n, seed, threshold, BM, BN)
    return tl.where(b_keep, b_low * keep_scale, 0.0)


@triton.jit
def rank_blocks(p_s, p_b, o_m, o_n, o_r, m_m, m_n, N: tl.constexpr, LR: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Blocks of s [M, LR] and of b, [N, LR] if TRANSPOSED else [LR, N], for some of the rank columns."""
    b_s = tl.load(p_s + o_m[:, None] * LR + o_r[None, :], mask=m_m[:, None], other=0.0)
    o_b = o_r[:, None] + o_n[None, :] * LR if TRANSPOSED else o_r[:, None] * N + o_n[None, :]
    return b_s, tl.load(p_b + o_b, mask=m_n[None, :], other=0.0)


@triton.jit
def rank_product(d_s, d_b, b_acc, m0, n0, i_r, TRANSPOSED: tl.constexpr):
    """b_acc plus the product of one block of rank columns, by descriptors."""
    b_s = d_s.load([m0, i_r])
    if TRANSPOSED:
        return tl.dot(b_s, d_b.load([n0, i_r]).T, b_acc)
    else:
        return tl.dot(b_s, d_b.load([i_r, n0]), b_acc)


@triton.jit
def halves_of(b_acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(b_acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def add_dropped(
    d_s, d_b, b_acc, p_token, m0, n0, M, seed0, seed1, seed2, threshold, keep_scale,
    R: tl.constexpr, COUNT: tl.constexpr, BR: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """b_acc [BM, BN] plus D'(s b') of each projection, by descriptors."""
    o_m = m0.to(tl.int64) + tl.arange(0, BM)
    for i_p in range(COUNT):
        b_low = tl.zeros((BM, BN), dtype=tl.float32)
        for i_r in tl.static_range(0, R // COUNT, BR):
            b_low = rank_product(d_s, d_b, b_low, m0, n0, i_p * (R // COUNT) + i_r, TRANSPOSED)
        seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
        b_acc += low_rank_dropout(b_low, p_token, o_m, M, n0, seed, threshold, keep_scale, BM, BN)
    return b_acc


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def gemm_kernel(
    p_x, p_w, p_s, p_b, p_bias, p_y, p_token, M, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64, keep_scale,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, COUNT: tl.constexpr, LR: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):
    """p_x [M, K]; p_w [N, K] if TRANSPOSED else [K, N]; p_s [M, LR]; p_b [N, LR] or [LR, N] alike; p_y [M, N].

    The first R of the LR columns count: those of COUNT projections side by side, each with a dropout mask of its own."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    b_acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        o_w = o_k[:, None] + o_n[None, :] * K if TRANSPOSED else o_k.to(tl.int64)[:, None] * N + o_n[None, :]
        b_w = tl.load(p_w + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    if R > 0:
        if DROPOUT:
            for i_p in range(COUNT):
                b_low = tl.zeros((BM, BN), dtype=tl.float32)
                for i_r in tl.static_range(0, R // COUNT, BR):
                    o_r = i_p * (R // COUNT) + i_r + tl.arange(0, BR)
                    b_s, b_b = rank_blocks(p_s, p_b, o_m, o_n, o_r, m_m, m_n, N, LR, TRANSPOSED)
                    b_low = tl.dot(b_s, b_b, b_low, input_precision=PRECISION)
                seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
                b_acc += low_rank_dropout(b_low, p_token, o_m, M, i_n * BN, seed, threshold, keep_scale, BM, BN)
        else:
            for i_r in tl.static_range(0, R, BR):
                b_s, b_b = rank_blocks(p_s, p_b, o_m, o_n, i_r + tl.arange(0, BR), m_m, m_n, N, LR, TRANSPOSED)
                b_acc = tl.dot(b_s, b_b, b_acc, input_precision=PRECISION)
    if BIAS:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_acc.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def gemm_tma_kernel(
    d_x, d_w, d_s, d_b, p_bias, d_y, p_token, M, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64, keep_scale,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, COUNT: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):
    """As :func:`gemm_kernel`; d_* are tensor descriptors, whose loads fill edges with zeros and whose stores clip.

    A persistent grid walks the tiles. HALVES: the tile leaves in two halves of BN / 2 columns, which halves the
    shared memory of the store and leaves room for a third pipeline stage.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = grouped_tile(tile, num_m, num_n, GROUP)
        m0 = i_m * BM
        n0 = i_n * BN
        b_acc = tl.zeros((BM, BN), dtype=tl.float32)
        for i_k in range(0, K, BK):
            b_x = d_x.load([m0, i_k])
            if TRANSPOSED:
                b_acc = tl.dot(b_x, d_w.load([n0, i_k]).T, b_acc)
            else:
                b_acc = tl.dot(b_x, d_w.load([i_k, n0]), b_acc)
        if R > 0 and not DROPOUT:
            for i_r in tl.static_range(0, R, BR):
                b_acc = rank_product(d_s, d_b, b_acc, m0, n0, i_r, TRANSPOSED)
        if BIAS:
            o_n = n0 + tl.arange(0, BN)
            b_acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        if DROPOUT and R > 0:
            # a quarter at a time: beside the whole tile's sum there is no room for a product of its size
            b_left, b_right = halves_of(b_acc, BM, BN)
            b_0, b_1 = halves_of(b_left, BM, BN // 2)
            b_2, b_3 = halves_of(b_right, BM, BN // 2)
            for i_quarter in tl.static_range(4):
                b_part = b_0 if i_quarter == 0 else b_1 if i_quarter == 1 else b_2 if i_quarter == 2 else b_3
                n1 = n0 + i_quarter * (BN // 4)
                b_part = add_dropped(
                    d_s, d_b, b_part, p_token, m0, n1, M, seed0, seed1, seed2, threshold, keep_scale,
                    R, COUNT, BR, TRANSPOSED, BM, BN // 4,
                )
                d_y.store([m0, n1], b_part.to(d_y.dtype))
        elif HALVES:
            b_left, b_right = halves_of(b_acc, BM, BN)
            d_y.store([m0, n0], b_left.to(d_y.dtype))
            d_y.store([m0, n0 + BN // 2], b_right.to(d_y.dtype))
        else:
            d_y.store([m0, n0], b_acc.to(d_y.dtype))


def stored_columns(tile, dropout: bool) -> int:
    """Columns in which the kernel by descriptors stores its tile, one part after the other."""
    return tile.bn // 4 if dropout else tile.bn // 2 if tile.halves else tile.bn


def gemm(x, weight, s=None, b=None, bias=None, *, transposed, dropout=None, layout=None):
    """out [M, N] = x W' + D'(s B') + bias.

    Args:
        x: [M, K] contiguous.
        weight: [N, K] with ``transposed``, else [K, N]; contiguous, x's dtype.
        s: [M, R] or None (no rank-r product: the frozen linear); b: [N, R] with ``transposed``, else [R, N]. Rank columns of several
            projections lie side by side; b is then block-diagonal with ``transposed``.
        bias: [N] or None.
        layout: :class:`fastlora.kernels.columns.Columns` of the rank columns; None: one projection's.
        dropout: None, or :class:`fastlora.kernels.launch.Dropout` for D'.
    """
    rows, inner = x.shape
    outer = weight.shape[0] if transposed else weight.shape[1]
    out = launch.empty(x, rows, outer)
    if rows == 0:
        return out
    stored = 0 if s is None else s.shape[1]
    count = 0 if dropout is None else len(dropout.seeds)
    if dropout is None:
        if gemm_specialized.run(x, weight, s, b, bias, out, transposed=transposed, layout=layout):
            return out
    elif not transposed and bias is None and gemm_dropout.run(x, weight, s, b, out, dropout, layout or single(stored, inner, 1.0)):
        return out
    drop = launch.dropout_arguments(dropout, x)
    made = _plan(rows, inner, outer, stored, layout, transposed, bias is not None, count, x.dtype, x.device)
    made(
        x, weight, x if s is None else s, weight if b is None else b, x if bias is None else bias, out,
        drop.tokens, rows, *drop.seeds, drop.threshold, drop.keep_scale,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def _plan(rows, inner, outer, stored, layout, transposed, biased, seeds, dtype, device) -> launch.Launch:
    """What a product's shape decides. ``stored``: the columns of s, 0 without it; ``seeds``: projections with a mask, 0 without dropout.
    """
    arch, dropout = launch.arch_at(device), seeds > 0
    tma = launch.can_use_tma(arch, dtype, inner, outer)
    tile = launch.gemm_tile(arch, dtype, dropout=dropout, tma=tma, ragged=launch.is_ragged(dtype, inner, outer))
    # without dropout the projections' products are one product; with it each has its own mask, and padding columns are left out
    count = seeds or 1
    used = stored if layout is None or not dropout else count * layout.padded
    low_rank = min(used // count, tile.bk) if stored else 16
    constants = dict(
        N=outer, K=inner, R=used, COUNT=count, TRANSPOSED=transposed, BIAS=biased, DROPOUT=dropout,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=low_rank, GROUP=tile.group,
    )  # fmt: skip
    tiles = launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
    if not tma:
        constants |= dict(LR=max(stored, 1), PRECISION="ieee" if dtype == torch.float32 else "tf32")
        return launch.Launch(gemm_kernel, (tiles,), tile, **constants)
    store = stored_columns(tile, dropout)

    def of_rows(width, columns):
        return launch.describer(dtype, width, tile.bm, columns)

    def across(depth, columns, deep):
        wide, block = (depth, (columns, deep)) if transposed else (outer, (deep, columns))
        return launch.describer(dtype, wide, *block)

    d_x, d_w = of_rows(inner, tile.bk), across(inner, tile.bn, tile.bk)
    d_s, d_b = d_x, d_w
    if stored:
        d_s, d_b = of_rows(stored, low_rank), across(stored, store if dropout else tile.bn, low_rank)
    constants |= dict(HALVES=tile.halves, FLATTEN=tile.flatten)
    describe = d_x, d_w, d_s, d_b, None, of_rows(outer, store)
    return launch.Launch(gemm_tma_kernel, (launch.even_programs(tiles, device),), tile, describe, **constants)
