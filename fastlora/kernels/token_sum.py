"""Sums over tokens: dB = dY^T S and dA = dS^T D(x), exact (int64 fixed point) or in fp32, and dS in the same pass.

The one kernel computes wide^T narrow for the projections of one input at once: for dB, wide is dY of all of them side by side and
each block of its features meets its own projection's columns of S; for dA, wide is x and one pass serves the columns of dS of
several projections. A program owns BF features and walks a run of chunks (kernels/chunks.py) in steps of 64 tokens. Each chunk's partial [BF, R] is an fp32
sum of fixed order. In exact mode it is rounded to int64 (2^-40 a unit, nearest even) and the integers are added in registers, then
once by atomics: integer addition has no order, so grid, micro-batches and processes give the same bits (the idea: Demmel and Nguyen,
"Parallel reproducible summation", IEEE TC 2015, here with one fixed bin). In fp32 mode the run's sum is stored and torch adds the runs.

Before each conversion the chunk is tested: a non-finite partial records the smallest chunk index, otherwise the largest |partial|
is recorded; the optimiser refuses the step unless largest x chunks < 2^23, so that no integer sum can have wrapped.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.chunks import LONGEST, UNIT, Chunks
from fastlora.kernels.columns import MOST, starts_and_widths
from fastlora.kernels.tile import keep_mask, to_fixed


@triton.jit(do_not_specialize=["M", "units", "runs", "first_chunk", "seed0", "seed1", "seed2", "threshold"])
def token_sum_kernel(
    p_wide, p_narrow, p_out, p_stats, p_b, p_ds, p_token, p_table, p_ends,
    M, units, runs, first_chunk: tl.int64, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64, keep_scale,
    LD: tl.constexpr, LR: tl.constexpr, B_LD: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PER: tl.constexpr, C: tl.constexpr,
    START0: tl.constexpr, START1: tl.constexpr, START2: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr,
    OUT_F: tl.constexpr, OUT_R: tl.constexpr, OUT_SIZE: tl.constexpr,
    EXACT: tl.constexpr, WITH_DS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):
    """p_wide [M, LD]; p_narrow [M, LR]: projection p owns columns p R to p R + RANK.

    Features come in up to three ranges [START, START + F), in blocks that cross none. A program serves PER projections in C >= PER R
    columns: with PER = 1 that of the feature range (dB), or that of the grid's first axis (dA of one at a time).
    p_out element (feature, column c of projection p) at feature * OUT_F + (p RANK + c) * OUT_R, in dB at feature * OUT_F + c * OUT_R;
    p_stats int64 [projections, 4]; p_b element (feature, c) at feature * B_LD + p R + c; p_ds fp32 [blocks, M, R].
    p_table int32 [2, units + 2], p_ends int8 [units + 1]: see :class:`fastlora.kernels.chunks.Chunks`. RANK <= R is the rank without padding."""
    # projections that share p_wide come first: their programs run beside each other and read it from the cache
    i_run = tl.program_id(1)
    i_block = tl.program_id(2)
    in0: tl.constexpr = (F0 + BF - 1) // BF
    in1: tl.constexpr = (F1 + BF - 1) // BF
    if F1 > 0:
        i_p = (i_block >= in0).to(tl.int32) + (i_block >= in0 + in1).to(tl.int32)
        start = tl.where(i_p == 0, START0, tl.where(i_p == 1, START1, START2))
        width = tl.where(i_p == 0, F0, tl.where(i_p == 1, F1, F2))
        i_f = i_block - tl.where(i_p == 0, 0, tl.where(i_p == 1, in0, in0 + in1))
    else:
        i_p = tl.program_id(0)
        start = START0
        width = F0
        i_f = i_block
    o_in = i_f * BF + tl.arange(0, BF)
    o_f = start + o_in
    o_c = tl.arange(0, C)
    m_f = o_in < width
    m_c = (o_c % R < RANK) & (o_c // R < PER)
    m_out = m_f[:, None] & m_c[None, :]
    o_row = (o_c // R) * RANK + o_c % R
    if F1 == 0:
        o_row += i_p * RANK
    o_out = o_f.to(tl.int64)[:, None] * OUT_F + o_row.to(tl.int64)[None, :] * OUT_R
    p_narrow += i_p * R
    if WITH_DS:
        b_b = tl.load(p_b + i_p * R + o_f.to(tl.int64)[:, None] * B_LD + o_c[None, :], mask=m_f[:, None], other=0.0)
        p_ds += i_block.to(tl.int64) * M * R
    if DROPOUT:
        seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
    b_sum = tl.zeros((BF, C), dtype=tl.float32)
    # a run starts where the next chunk does, so no chunk is shared by two programs
    first = tl.load(p_table + i_run * units // runs)
    last = tl.load(p_table + (i_run + 1) * units // runs)
    if EXACT:
        # bytes, read a step ahead: the compiler would copy a word asynchronously, and wait each step for all copies under way
        ends_next = tl.load(p_ends + first)
        b_total = tl.zeros((BF, C), dtype=tl.int64)
        b_top = tl.zeros((BF, C), dtype=tl.int32)
        b_counts = tl.zeros((BF, C), dtype=tl.int32)
    for i_unit in range(first, last):
        if EXACT:
            ends = ends_next
            ends_next = tl.load(p_ends + i_unit + 1)
        for i_step in tl.static_range(0, UNIT, BM):
            o_m = (i_unit * UNIT + i_step + tl.arange(0, BM)).to(tl.int64)
            m_m = o_m < M
            b_wide = tl.load(p_wide + o_m[:, None] * LD + o_f[None, :], mask=m_m[:, None] & m_f[None, :], other=0.0)
            b_narrow = tl.load(p_narrow + o_m[:, None] * LR + o_c[None, :], mask=m_m[:, None], other=0.0)
            if WITH_DS:
                b_ds = tl.dot(b_wide, b_b, input_precision=PRECISION)
                tl.store(p_ds + o_m[:, None] * R + o_c[None, :], b_ds, mask=m_m[:, None])
            if DROPOUT:
                b_token = tl.load(p_token + o_m, mask=m_m, other=0)
                b_keep = keep_mask(b_token, i_f * BF, seed, threshold, BM, BF)
                b_wide = tl.where(b_keep, b_wide.to(tl.float32) * keep_scale, 0.0).to(b_wide.dtype)
            b_sum = tl.dot(tl.trans(b_wide), b_narrow, b_sum, input_precision=PRECISION)
        if EXACT:  # noqa: SIM102 - decided when compiled, the other when run
            if ends != 0:
                # |partial| as its bit pattern: orders like the number, and anything non-finite lies at or above inf
                b_bits = b_sum.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                b_top = tl.maximum(b_top, b_bits)
                b_total += to_fixed(tl.where(b_bits < 0x7F800000, b_sum, 0.0))
                # three counts of MOST_WALK at most: chunks before the first non-finite one, partials that are not 0, and of
                # those the ones below 2^-30 (0x30800000), which keep under 10 bits
                b_counts += (b_top < 0x7F800000).to(tl.int32)
                b_counts += tl.where(b_bits > 0, tl.where(b_bits < 0x30800000, 1024 + 1048576, 1024), 0)
                b_sum = tl.zeros((BF, C), dtype=tl.float32)
    if EXACT:
        tl.atomic_add(p_out + o_out, b_total, mask=m_out, sem="relaxed")
        # nothing is reduced before the run's end: across features a reduction costs more than the chunk's product
        first_here = tl.load(p_table + units + 2 + first)
        # two reductions carry all four figures. A non-finite element's key lies above every finite one, the higher the earlier it broke.
        b_key = tl.where(b_top < 0x7F800000, b_top, 0x7F800000 + 1023 - (b_counts & 1023))
        b_pair = (b_counts >> 10 & 1023).to(tl.int64) | (b_counts >> 20).to(tl.int64) << 32
        for i_q in tl.static_range(PER):
            m_q = m_out & (o_c // R == i_q)[None, :]
            p_q = p_stats + (i_p + i_q) * 4
            key = tl.max(tl.where(m_q, b_key, 0))
            pair = tl.sum(tl.where(m_q, b_pair, 0))
            broken = key >= 0x7F800000
            number = first_chunk + first_here + 1023 - (key - 0x7F800000)
            tl.atomic_min(p_q, number.to(tl.int64), mask=broken, sem="relaxed")
            tl.atomic_max(p_q + 1, key.to(tl.int64), mask=broken == 0, sem="relaxed")
            tl.atomic_add(p_q + 2, (pair & 0xFFFFFFFF).to(tl.int64), sem="relaxed")
            tl.atomic_add(p_q + 3, (pair >> 32).to(tl.int64), sem="relaxed")
    else:
        tl.store(p_out + i_run.to(tl.int64) * OUT_SIZE + o_out, b_sum, mask=m_out)


@triton.jit(do_not_specialize=["M"])
def reduce_ds_kernel(
    p_part, p_ds, p_scale, M, R: tl.constexpr, LR: tl.constexpr, PARTS0: tl.constexpr, PARTS1: tl.constexpr,
    PARTS2: tl.constexpr, BM: tl.constexpr,
):
    """dS [M, LR] = round(scale * sum of a projection's fp32 partials, added in order); columns of no projection are zeroed."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_p = tl.program_id(1)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    first = tl.where(i_p == 0, 0, tl.where(i_p == 1, PARTS0, PARTS0 + PARTS1))
    parts = tl.where(i_p == 0, PARTS0, tl.where(i_p == 1, PARTS1, tl.where(i_p == 2, PARTS2, 0)))
    b_acc = tl.zeros((BM, R), dtype=tl.float32)
    for i_part in range(first, first + parts):
        p_row = p_part + (o_m + i_part * M.to(tl.int64))[:, None] * R + o_r[None, :]
        b_acc += tl.load(p_row, mask=m_m, other=0.0)
    b_acc *= tl.load(p_scale + i_p * R + o_r)[None, :]
    tl.store(p_ds + i_p * R + o_m[:, None] * LR + o_r[None, :], b_acc.to(p_ds.dtype.element_ty), mask=m_m)


# Chunks one program walks at most: three counts of them share an int32.
MOST_WALK = 1023


def _runs(count: int, units: int, blocks: int, each: int, device: torch.device) -> int:
    """Into how many runs the chunks are cut: about ``each`` programs a multiprocessor.

    Free of bits in exact mode (integers), and in fp32 mode a fixed function of the shape.
    """
    programs = launch.persistent_programs(device)
    # one at a time: a second wave of a few programs would cost as much as the first
    return runs_of(count, units, programs // blocks if each == 1 else launch.cdiv(each * programs, blocks))


def runs_of(count: int, units: int, wanted: int) -> int:
    """``wanted``, or as near to it as ``count`` chunks of so many units in all allow."""
    return max(min(wanted, count), 1, launch.cdiv(units, MOST_WALK - LONGEST // UNIT))


@dataclasses.dataclass(frozen=True)
class Sink:
    """Where exact sums go: int64 ``total`` and ``stats`` [projections, 4] that hold the ``parts`` (TokenSum), one a projection."""

    total: torch.Tensor
    stats: torch.Tensor
    parts: tuple

    def count(self, chunks: int) -> int:
        """Count chunks in every part; the number of the first of them."""
        first = self.parts[0].chunks
        for part in self.parts:
            part.count(chunks)
        return first


class _Plan(NamedTuple):
    """What a sum's shape decides: the launch, into how many runs it cuts the tokens, the partial sums in fp32 mode."""

    launch: launch.Launch
    runs: int
    shape: tuple[int, int]


def _plan(
    rows, count, layout, tile, dtype, device, *, features, shape, exact, ranges, per, columns, feature_major, dropout=False, with_ds=False
) -> _Plan:
    units = launch.cdiv(rows, UNIT)
    blocks = sum(launch.cdiv(width, tile.bn) for _, width in ranges)
    runs = _runs(count, units, blocks, tile.each, device)
    depth = layout.count if not feature_major and per == 1 else 1
    starts, widths = starts_and_widths(ranges)
    made = launch.Launch(
        token_sum_kernel, (depth, runs, blocks), tile,
        LD=features, LR=layout.columns, B_LD=layout.columns, R=layout.padded, RANK=layout.rank, PER=per, C=columns,
        START0=starts[0], START1=starts[1], START2=starts[2], F0=widths[0], F1=widths[1], F2=widths[2],
        OUT_F=layout.rank if feature_major else 1, OUT_R=1 if feature_major else features, OUT_SIZE=shape[0] * shape[1],
        EXACT=exact, WITH_DS=with_ds, DROPOUT=dropout, PRECISION="ieee" if dtype == torch.float32 else "tf32",
        UNIT=UNIT, BM=tile.bm, BF=tile.bn,
    )  # fmt: skip
    return _Plan(made, runs, shape)


def _sum(plan: _Plan, wide, narrow, chunks: Chunks, sink: Sink | None, dropout=None, b=None, partial=None):
    """The kernel's one call; the fp32 sum, or None with a sink."""
    if sink is not None:
        out, stats, first = sink.total, sink.stats, sink.count(chunks.count)
    else:
        out, stats, first = launch.empty(wide, plan.runs, *plan.shape, dtype=torch.float32), narrow, 0
    drop = launch.dropout_arguments(dropout, wide)
    plan.launch(
        wide, narrow, out, stats, narrow if b is None else b, narrow if partial is None else partial, drop.tokens, chunks.table, chunks.ends,
        wide.shape[0], chunks.units, plan.runs, first, *drop.seeds, drop.threshold, drop.keep_scale,
    )  # fmt: skip
    return None if sink is not None else out.sum(0)


@functools.lru_cache(maxsize=1024)  # rows and chunks differ from step to step
def _plan_b(rows, features, count, layout, exact, with_ds, dtype, device):
    """(plan of dB, blocks of partial dS, launch of their reduction or None, scale of each column)."""
    tile = launch.token_sum_tile(launch.arch_at(device), dtype, layout.padded, with_ds=with_ds, features=features)
    plan = _plan(
        rows, count, layout, tile, dtype, device, features=features, shape=(features, layout.rank), exact=exact, ranges=layout.ranges,
        per=1, columns=layout.padded, feature_major=True, with_ds=with_ds,
    )  # fmt: skip
    if not with_ds:
        return plan, 0, None, None
    parts = [launch.cdiv(width, tile.bn) for width in layout.widths]
    blocks = sum(parts)
    parts += [0] * (MOST - len(parts))
    tile = launch.reduce_tile(layout.padded)
    reduce = launch.Launch(
        reduce_ds_kernel, (launch.cdiv(rows, tile.bm), layout.columns // layout.padded), tile,
        R=layout.padded, LR=layout.columns, PARTS0=parts[0], PARTS1=parts[1], PARTS2=parts[2], BM=tile.bm,
    )  # fmt: skip
    return plan, blocks, reduce, layout.scale_of_columns(device)


def sum_b(dy, s, layout, chunks, *, sink=None, b=None):
    """dB = dY^T S for all projections in one pass over dY, and dS in the same pass when ``b`` is given.

    Args:
        dy: [M, N] contiguous, the projections' outputs side by side; s: [M, layout.columns]; one dtype.
        layout: :class:`fastlora.kernels.columns.Columns`; chunks: :class:`fastlora.kernels.chunks.Chunks` of the M rows.
        sink: None for fp32 sums, or :class:`Sink` of totals [N, layout.rank].
        b: [N, layout.columns] block-diagonal, or None.

    Returns:
        (fp32 [N, layout.rank] or None with a sink, dS [M, layout.columns] in dy's dtype or None)
    """
    rows, features = dy.shape
    ds = None if b is None else launch.empty(dy, rows, layout.columns)
    if rows == 0:
        return (None if sink is not None else dy.new_zeros((features, layout.rank), dtype=torch.float32)), ds
    plan, blocks, reduce, scales = _plan_b(rows, features, chunks.count, layout, sink is not None, b is not None, dy.dtype, dy.device)
    if b is None:
        return _sum(plan, dy, s, chunks, sink), None
    partial = launch.empty(dy, blocks, rows, layout.padded, dtype=torch.float32)
    db = _sum(plan, dy, s, chunks, sink, b=b, partial=partial)
    reduce(partial, ds, scales, rows)
    return db, ds


# Columns of dS that one pass over x serves: more, and the integers of a program spill.
MOST_COLUMNS = 64


@functools.lru_cache(maxsize=1024)  # rows and chunks differ from step to step
def _plan_a(rows, features, count, layout, exact, dropout, dtype, device) -> _Plan:
    together = layout.count == 1 or (not dropout and layout.columns <= MOST_COLUMNS)
    per, columns = (layout.count, layout.columns) if together else (1, layout.padded)
    tile = launch.token_sum_tile(launch.arch_at(device), dtype, columns, with_ds=False, features=features, apart=not together)
    return _plan(
        rows, count, layout, tile, dtype, device, features=features, shape=(layout.count * layout.rank, features), exact=exact,
        ranges=((0, features),), per=per, columns=columns, feature_major=False, dropout=dropout,
    )  # fmt: skip


def sum_a(x, ds, layout, chunks, *, sink=None, dropout=None):
    """dA = dS^T D(x) for all projections: one pass over x, or one a projection where ranks are high or dropout masks differ.

    Args:
        x: [M, K] contiguous; ds: [M, layout.columns]; one dtype. layout, chunks: as for :func:`sum_b`.
        sink: None for fp32 sums, or :class:`Sink` of totals [projections * layout.rank, K].
        dropout: None, or :class:`fastlora.kernels.launch.Dropout`.

    Returns:
        fp32 [projections * layout.rank, K], or None with a sink.
    """
    rows, features = x.shape
    if rows == 0:
        return None if sink is not None else x.new_zeros((layout.count * layout.rank, features), dtype=torch.float32)
    plan = _plan_a(rows, features, chunks.count, layout, sink is not None, dropout is not None, x.dtype, x.device)
    return _sum(plan, x, ds, chunks, sink, dropout)
