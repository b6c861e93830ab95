"""Sums over tokens: dB = dY^T S and dA = dS^T D(x), exact (int64 fixed point) or in fp32, and dS in the same pass.

The one kernel computes wide^T narrow, wide [M, F], narrow [M, R]. A program owns BF features and walks a run of
128-token chunks. Each chunk's partial [BF, R] is an fp32 sum of fixed order. In exact mode it is rounded to int64
(2^-40 a unit, nearest even) and the integers are added in registers, then once by atomics: integer addition has no order, so
grid, micro-batches and processes give the same bits (the idea: Demmel and Nguyen, "Parallel reproducible summation",
IEEE TC 2015, here with one fixed bin). In fp32 mode the run's sum is stored and torch adds the runs.

Before each conversion the chunk is tested: a non-finite partial records the smallest chunk index, otherwise the largest |partial|
is recorded; the optimiser refuses the step unless largest x chunks < 2^23, so that no integer sum can have wrapped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tile import CHUNK, keep_mask, to_fixed


@triton.jit(do_not_specialize=["M", "chunks", "walk", "first_chunk", "seed", "threshold"])
def token_sum_kernel(
    p_wide, p_narrow, p_out, p_stats, p_b, p_ds, p_token,
    M, chunks, walk, first_chunk: tl.int64, seed: tl.int64, threshold: tl.int64, keep_scale,
    F: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, OUT_F: tl.constexpr, OUT_R: tl.constexpr,
    EXACT: tl.constexpr, WITH_DS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):
    """p_wide [M, F]; p_narrow [M, R]; p_out element (feature, rank) at feature * OUT_F + rank * OUT_R; p_b [F, R];
    p_ds fp32 [F / BF, M, R] partials of dS. RANK <= R is the rank without padding."""
    tl.static_assert(BF * R < 65536)  # two counts share one int32 below
    i_run = tl.program_id(0)
    i_f = tl.program_id(1)
    o_f = i_f * BF + tl.arange(0, BF)
    o_r = tl.arange(0, R)
    m_f = o_f < F
    m_out = m_f[:, None] & (o_r < RANK)[None, :]
    o_out = o_f.to(tl.int64)[:, None] * OUT_F + o_r.to(tl.int64)[None, :] * OUT_R
    if WITH_DS:
        b_b = tl.load(p_b + o_f.to(tl.int64)[:, None] * R + o_r[None, :], mask=m_f[:, None], other=0.0)
        p_ds += i_f.to(tl.int64) * M * R
    b_sum = tl.zeros((BF, R), dtype=tl.float32)
    if EXACT:
        b_total = tl.zeros((BF, R), dtype=tl.int64)
        largest = tl.full((), 0, tl.int32)
        nonzero = tl.full((), 0, tl.int32)
        weak = tl.full((), 0, tl.int32)
        broken = tl.full((), 4611686018427387904, tl.int64)  # 2^62: none
    first = i_run * walk
    last = tl.minimum(first + walk, chunks)
    for i_chunk in range(first, last):
        if EXACT:
            b_sum = tl.zeros((BF, R), dtype=tl.float32)
        for i_step in tl.static_range(0, CHUNK, BM):
            o_m = (i_chunk * CHUNK + i_step + tl.arange(0, BM)).to(tl.int64)
            m_m = o_m < M
            b_wide = tl.load(p_wide + o_m[:, None] * F + o_f[None, :], mask=m_m[:, None] & m_f[None, :], other=0.0)
            b_narrow = tl.load(p_narrow + o_m[:, None] * R + o_r[None, :], mask=m_m[:, None], other=0.0)
            if WITH_DS:
                b_ds = tl.dot(b_wide, b_b, input_precision=PRECISION)
                tl.store(p_ds + o_m[:, None] * R + o_r[None, :], b_ds, mask=m_m[:, None])
            if DROPOUT:
                b_token = tl.load(p_token + o_m, mask=m_m, other=0)
                b_keep = keep_mask(b_token, i_f * BF, seed, threshold, BM, BF)
                b_wide = tl.where(b_keep, b_wide.to(tl.float32) * keep_scale, 0.0).to(b_wide.dtype)
            b_sum = tl.dot(tl.trans(b_wide), b_narrow, b_sum, input_precision=PRECISION)
        if EXACT:
            # |partial| as its bit pattern: orders like the number, and anything non-finite lies at or above inf.
            b_bits = b_sum.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            top = tl.max(tl.max(b_bits, 1), 0)
            if top >= 0x7F800000:
                broken = tl.minimum(broken, first_chunk + i_chunk)
            else:
                largest = tl.maximum(largest, top)
                b_total += to_fixed(b_sum)
            # 0x30800000 = 2^-30: below it fewer than 10 bits of the partial are kept
            b_count = (b_bits > 0).to(tl.int32) + ((b_bits > 0) & (b_bits < 0x30800000)).to(tl.int32) * 65536
            count = tl.sum(tl.sum(b_count, 1), 0)
            nonzero += count & 0xFFFF
            weak += count >> 16
    if EXACT:
        tl.atomic_add(p_out + o_out, b_total, mask=m_out, sem="relaxed")
        tl.atomic_min(p_stats, broken, sem="relaxed")
        tl.atomic_max(p_stats + 1, largest.to(tl.int64), sem="relaxed")
        tl.atomic_add(p_stats + 2, nonzero.to(tl.int64), sem="relaxed")
        tl.atomic_add(p_stats + 3, weak.to(tl.int64), sem="relaxed")
    else:
        tl.store(p_out + i_run.to(tl.int64) * F * RANK + o_out, b_sum, mask=m_out)


@triton.jit(do_not_specialize=["M"])
def reduce_ds_kernel(p_part, p_ds, M, scale, R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr):
    """dS [M, R] = round(scale * sum of the PARTS fp32 partials, added in order)."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    b_acc = tl.zeros((BM, R), dtype=tl.float32)
    for i_part in range(PARTS):
        p_row = p_part + (o_m + i_part * M.to(tl.int64))[:, None] * R + o_r[None, :]
        b_acc += tl.load(p_row, mask=m_m, other=0.0)
    tl.store(p_ds + o_m[:, None] * R + o_r[None, :], (b_acc * scale).to(p_ds.dtype.element_ty), mask=m_m)


def token_sum(wide, narrow, rank, *, feature_major, exact=None, dropout=None, b=None, ds_scale=None):
    """wide^T narrow over all tokens, and dS = ds_scale * wide b in the same pass when ``b`` is given.

    Args:
        wide: [M, F] contiguous; narrow: [M, R] contiguous, R the padded rank; both of one dtype.
        rank: the rank without padding; columns beyond it are not written.
        feature_major: the result's layout: True [F, rank] (dB), False [rank, F] (dA).
        exact: None for fp32 sums, or :class:`fastlora.exact.TokenSum` to add to.
        dropout: None, or :class:`fastlora.kernels.launch.Dropout` applied to ``wide``.
        b: [F, R] contiguous, or None.

    Returns:
        (sum fp32 or None in exact mode, dS [M, R] or None)
    """
    rows, features = wide.shape
    padded = narrow.shape[1]
    shape = (features, rank) if feature_major else (rank, features)
    with_ds = b is not None
    ds = torch.empty(rows, padded, device=wide.device, dtype=wide.dtype) if with_ds else None
    if rows == 0:
        return (None if exact is not None else torch.zeros(shape, device=wide.device)), ds
    arch = launch.arch_of(wide)
    tile = launch.token_sum_tile(arch, wide.dtype, padded, with_ds=with_ds)
    chunks = launch.cdiv(rows, CHUNK)
    blocks = launch.cdiv(features, tile.bn)
    walk = launch.chunks_per_program(chunks, blocks, wide.device)
    runs = launch.cdiv(chunks, walk)
    partial = torch.empty(blocks, rows, padded, device=wide.device, dtype=torch.float32) if with_ds else narrow
    if exact is not None:
        out, stats, first = exact.total, exact.stats, exact.chunks
        exact.count(chunks)
    else:
        out, stats, first = torch.empty(runs, *shape, device=wide.device, dtype=torch.float32), narrow, 0
    drop = launch.dropout_arguments(dropout, wide)
    launch.run(
        token_sum_kernel, (runs, blocks), tile,
        wide, narrow, out, stats, b if with_ds else narrow, partial, drop.tokens,
        rows, chunks, walk, first, drop.seed, drop.threshold, drop.keep_scale,
        F=features, R=padded, RANK=rank,
        OUT_F=rank if feature_major else 1, OUT_R=1 if feature_major else features,
        EXACT=exact is not None, WITH_DS=with_ds, DROPOUT=drop.active,
        PRECISION="ieee" if wide.dtype == torch.float32 else "tf32", CHUNK=CHUNK, BM=tile.bm, BF=tile.bn,
    )
    if with_ds:
        reduce = launch.reduce_tile(padded)
        launch.run(
            reduce_ds_kernel, (launch.cdiv(rows, reduce.bm),), reduce,
            partial, ds, rows, float(ds_scale), R=padded, PARTS=blocks, BM=reduce.bm,
        )
    return (None if exact is not None else out.sum(0)), ds
