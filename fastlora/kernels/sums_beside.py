"""Token sums inside the launch of the product dX = dY W + dS A, for Hopper (compute capability 9.0): dB = dY^T S and dA = dS^T x.

Programs that are through with dS (project_beside.py), and after the last turn of tiles those of the tiles too, take pieces of the sums from
two queues until none is left. A piece is FEATURES features over a run of chunks. So multiprocessors that tiles leave idle are busy to the
end, and what is left then is read by all of them at once, with no launch in between. Who takes a piece changes from run to run; the bits do
not, as integers are added. Partial sums, their rounding and their figures are those of token_sum.py, bit for bit.

Words behind those of the rows of tiles (project_beside.py): pieces of dB taken, pieces of dA taken, warpgroups that have made their dS, programs
that found both queues empty; the last of these sets all four to 0 for the next launch. Pieces of dA wait for the third word. In Gluon (see hopper.py).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from fastlora.kernels.chunks import UNIT, Chunks
from fastlora.kernels.hopper import (
    MISSING,
    barrier,
    copy_in,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastlora.kernels.project_beside import MORE
from fastlora.kernels.token_sum import MOST_COLUMNS, Sink, runs_of

# Features of a piece: half of them a warpgroup, whose integers then fit its registers with 64 columns.
FEATURES = 128

if MISSING is None:
    from fastlora.kernels.project_beside import order_memory
    from fastlora.kernels.ring import claim

    # the words: first a queue's each
    STORED, LEFT, ALL = gl.constexpr(2), gl.constexpr(3), gl.constexpr(MORE)
    WIDE, HALF_WIDE, STEP = gl.constexpr(FEATURES), gl.constexpr(FEATURES // 2), gl.constexpr(UNIT)
    MOST_C = gl.constexpr(MOST_COLUMNS)

    @gluon.jit
    def add_word(p_word, sem: gl.constexpr):
        """The number in a word before 1 was added to it, by a warp."""
        o_t = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        seen = gl.atomic_add(p_word + o_t * 0, o_t * 0 + 1, mask=o_t == 0, sem=sem, scope="gpu")
        return gl.sum(gl.where(o_t == 0, seen, 0), 0)

    @gluon.jit
    def publish(s_piece, full, empty, turn, piece, first, last, stop):
        """Tell the warpgroups the ``turn``-th piece of this program, in one of two places."""
        slot = turn % 2
        mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
        o_t = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        s_piece.index(slot).store(gl.where(o_t == 0, piece, gl.where(o_t == 1, first, gl.where(o_t == 2, last, stop))))
        barrier()
        mbarrier.arrive(full.index(slot))

    @gluon.jit
    def learn(s_piece, full, empty, turn):
        """What :func:`publish` told, in a warpgroup: the piece, -1 if there is none; its first unit, the one behind its last, the one behind its
        first chunk."""
        slot = turn % 2
        mbarrier.wait(full.index(slot), (turn // 2) & 1)
        b_told = s_piece.index(slot).load(gl.BlockedLayout([1], [32], [4], [0]))
        barrier()
        mbarrier.arrive(empty.index(slot))
        o_t = gl.arange(0, 32, gl.BlockedLayout([1], [32], [4], [0]))
        piece, first = gl.max(gl.where(o_t == 0, b_told, -1), 0), gl.max(gl.where(o_t == 1, b_told, 0), 0)
        return piece, first, gl.max(gl.where(o_t == 2, b_told, 0), 0), gl.max(gl.where(o_t == 3, b_told, 0), 0)

    @gluon.jit
    def place_of_b(piece, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr):
        """(run, first feature, projection) of a piece of dB."""
        blocks: gl.constexpr = (F0 + F1 + F2) // WIDE
        inside = piece % blocks * WIDE
        i_p = (inside >= F0).to(gl.int32) + (inside >= F0 + F1).to(gl.int32)
        if F1 == 0:
            i_p = inside * 0
        feature = inside + S0
        if F1 > 0:
            feature = gl.where(i_p == 0, feature, inside - F0 + S1)
        if F2 > 0:
            feature = gl.where(i_p == 2, inside - F0 - F1 + S2, feature)
        return piece // blocks, feature, i_p

    @gluon.jit
    def place_of_a(piece, N: gl.constexpr, GROUPS: gl.constexpr):
        """(run, first feature, group of columns) of a piece of dA: pieces of the same x beside each other."""
        blocks: gl.constexpr = N // WIDE
        return piece // GROUPS // blocks, piece // GROUPS % blocks * WIDE, piece % GROUPS

    @gluon.jit
    def load_run(
        d_wide, d_narrow, s_wide, s_narrow, full, empty, turn, p_table, first, last, stop, M, feature, column, C: gl.constexpr, DEEP: gl.constexpr
    ):  # fmt: skip
        """Copy the blocks of a piece, a pair of units a place; an odd one is paired with rows behind the last, zeros."""
        start = first
        while start < last:
            next_stop = gl.load(p_table + stop + 1)  # of a unit, where the next chunk starts
            for i_unit in range(start, stop, 2):
                stage, bar = claim(full, empty, turn, 2 * STEP * (WIDE + C) * 2, DEEP)
                for i_half in gl.static_range(2):
                    row = i_unit * STEP if i_half == 0 else gl.where(i_unit + 1 < stop, (i_unit + 1) * STEP, M)
                    copy_in(d_wide, [row, feature], bar, s_wide.index(stage * 2 + i_half))
                    copy_in(d_narrow, [row, column], bar, s_narrow.index((stage * 2 + i_half) * (MOST_C // C)))
                turn += 1
            start = stop
            stop = next_stop
        return turn

    @gluon.jit
    def load_sums(
        d_y, d_s, d_x, d_ds, p_words, p_table, s_piece, s_wide, s_s, s_ds, idle, told, heard, full, empty, helpers, M, units, runs_b, runs_a,
        N: gl.constexpr, SUMS: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr,
        F2: gl.constexpr, C: gl.constexpr, GROUPS_A: gl.constexpr, C_A: gl.constexpr, DEEP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: pieces, and what they are made of, until both queues are empty."""
        pieces_b = (F0 + F1 + F2) // WIDE * runs_b
        pieces_a = pieces_b * 0
        if SUMS > 1:
            pieces_a += N // WIDE * GROUPS_A * runs_a
        turn = 0
        taken = 0
        # dA waits for dS, so who is done with dS has dB first; the long pieces of dA are begun as soon as all are
        of_a = (gl.program_id(0) >= helpers).to(gl.int32)
        tried = 0
        while tried < 2:
            piece = add_word(p_words + of_a, "relaxed")
            if piece >= gl.where(of_a == 1, pieces_a, pieces_b):
                tried += 1
                of_a = 1 - of_a
            elif of_a == 1:
                if SUMS > 1:
                    i_run, feature, i_p = place_of_a(piece, N, GROUPS_A)
                    first = gl.load(p_table + i_run * units // runs_a)
                    last = gl.load(p_table + (i_run + 1) * units // runs_a)
                    stop = gl.load(p_table + first + 1)
                    publish(s_piece, told, heard, taken, pieces_b + piece, first, last, stop)
                    taken += 1
                    stored = gl.load(p_words + STORED, volatile=True)
                    while stored < 2 * helpers:
                        stored = gl.load(p_words + STORED, volatile=True)
                    order_memory(piece)
                    mbarrier.wait(idle.index(0), 0)
                    turn = load_run(d_x, d_ds, s_wide, s_ds, full, empty, turn, p_table, first, last, stop, M, feature, i_p * C_A, C_A, DEEP)
            else:
                i_run, feature, i_p = place_of_b(piece, S0, S1, S2, F0, F1, F2)
                first = gl.load(p_table + i_run * units // runs_b)
                last = gl.load(p_table + (i_run + 1) * units // runs_b)
                stop = gl.load(p_table + first + 1)
                publish(s_piece, told, heard, taken, piece, first, last, stop)
                taken += 1
                # the first time: until the ring's memory has been read for the last time as the one of the product
                mbarrier.wait(idle.index(0), 0)
                turn = load_run(d_y, d_s, s_wide, s_s, full, empty, turn, p_table, first, last, stop, M, feature, i_p * C, C, DEEP)
        publish(s_piece, told, heard, taken, -1, 0, 0, 0)
        mbarrier.wait(idle.index(0), 0)  # its warpgroups have added their word: nobody writes one later
        if add_word(p_words + LEFT, "acq_rel") == gl.num_programs(0) - 1:
            o_t = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
            gl.store(p_words + o_t, o_t * 0, mask=o_t < ALL)

    @gluon.jit
    def figures(b_bits, PARTS: gl.constexpr, R: gl.constexpr):
        """Of each row and projection of |partials| as bits: the largest; how many are not 0, and 2^16 times how many of those lie below
        2^-30 (0x30800000) and keep under 10 bits."""
        b_some = gl.where(b_bits > 0, gl.where(b_bits < 0x30800000, 65537, 1), 0)
        return gl.max(gl.reshape(b_bits, (HALF_WIDE, PARTS, R)), 2), gl.sum(gl.reshape(b_some, (HALF_WIDE, PARTS, R)), 2)

    @gluon.jit
    def add_run(
        s_wide, s_narrow, full, empty, turn, p_table, p_out, p_stats, first, last, stop, units, first_chunk, feature, i_p, i_row,
        HALF: gl.constexpr, C: gl.constexpr, R: gl.constexpr, RANK: gl.constexpr, PER: gl.constexpr, OUT_F: gl.constexpr,
        OUT_R: gl.constexpr, DEEP: gl.constexpr,
    ):  # fmt: skip
        """A warpgroup's half of the piece from ``feature`` on, for PER projections from the ``i_p``-th on, R columns each. p_out: element
        (feature, column c of the q-th of them) at feature * OUT_F + (i_row + q * RANK + c) * OUT_R."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
        b_total = gl.zeros((HALF_WIDE, C), gl.int64, layout)
        b_top, b_some = figures(gl.zeros((HALF_WIDE, C), gl.int32, layout), C // R, R)
        b_whole = b_some
        start = first
        first_here = gl.load(p_table + units + 2 + first)
        while start < last:
            next_stop = gl.load(p_table + stop + 1)
            b_sum = gl.zeros((HALF_WIDE, C), gl.float32, layout)
            for i_unit in range(start, stop, 2):
                stage = turn % DEEP
                mbarrier.wait(full.index(stage), (turn // DEEP) & 1)
                for i_half in gl.static_range(2):
                    b_wide = s_wide.index(stage * 2 + i_half).slice(HALF * HALF_WIDE, HALF_WIDE, dim=1).permute((1, 0))
                    b_sum = warpgroup_mma(b_wide, s_narrow.index((stage * 2 + i_half) * (MOST_C // C)), b_sum, is_async=True)
                b_sum = warpgroup_mma_wait(2, deps=[b_sum])
                mbarrier.arrive(empty.index((turn + DEEP - 1) % DEEP), pred=i_unit > start)
                turn += 1
            b_sum = warpgroup_mma_wait(0, deps=[b_sum])
            mbarrier.arrive(empty.index((turn + DEEP - 1) % DEEP))
            b_bits = b_sum.to(gl.int32, bitcast=True) & 0x7FFFFFFF
            b_most, b_more = figures(b_bits, C // R, R)
            b_top = gl.maximum(b_top, b_most)
            b_some += b_more
            b_whole += (b_top < 0x7F800000).to(gl.int32)
            b_units = gl.where(b_bits < 0x7F800000, b_sum, 0.0) * 1099511627776.0
            # to_fixed of tile.py in one instruction
            b_total += gl.inline_asm_elementwise("cvt.rni.s64.f32 $0, $1;", "=l,f", [b_units], dtype=gl.int64, is_pure=True, pack=1)
            start = stop
            stop = next_stop
        o_f = feature + HALF * HALF_WIDE + gl.arange(0, HALF_WIDE, gl.SliceLayout(1, layout))
        o_c = gl.arange(0, C, gl.SliceLayout(0, layout))
        o_row = i_row + (o_c // R) * RANK + o_c % R
        o_out = o_f.to(gl.int64)[:, None] * OUT_F + o_row.to(gl.int64)[None, :] * OUT_R
        m_out = ((o_c % R < RANK) & (o_c // R < PER))[None, :] & (o_f >= 0)[:, None]
        # a reduction, of which nothing comes back, as gl.atomic_add would have it
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p red.relaxed.gpu.global.add.u64 [$1], $2; mov.u32 $0, 0; }", "=r,l,l,r",
            [(p_out + o_out).to(gl.int64), b_total, m_out.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
        )
        # a non-finite partial's key lies above every finite one, the higher the earlier its chunk
        b_key = gl.max(gl.where(b_top < 0x7F800000, b_top, 0x7F800000 + 1023 - b_whole), 0)
        b_filled, b_small = gl.sum(b_some & 0xFFFF, 0), gl.sum(b_some >> 16 & 0xFFFF, 0)
        o_q = gl.arange(0, C // R, b_key.type.layout)
        p_q, m_q, b_broken = p_stats + (i_p + o_q) * 4, o_q < PER, b_key >= 0x7F800000
        gl.atomic_min(p_q, first_chunk + first_here + 1023 - (b_key - 0x7F800000).to(gl.int64), mask=m_q & b_broken, sem="relaxed")
        gl.atomic_max(p_q + 1, b_key.to(gl.int64), mask=m_q & (b_key < 0x7F800000), sem="relaxed")
        gl.atomic_add(p_q + 2, b_filled.to(gl.int64), mask=m_q, sem="relaxed")
        gl.atomic_add(p_q + 3, b_small.to(gl.int64), mask=m_q, sem="relaxed")
        return turn

    @gluon.jit
    def add_sums(
        HALF: gl.constexpr, p_words, p_db, p_stats_b, p_da, p_stats_a, p_table, s_piece, s_wide, s_s, s_ds, idle, told, heard, full, empty,
        helpers, units, runs_b, first_b, first_a,
        N: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr,
        C: gl.constexpr, RANK: gl.constexpr, SUMS: gl.constexpr, GROUPS_A: gl.constexpr, C_A: gl.constexpr, PER_A: gl.constexpr,
        DEEP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup: its half of each piece the loading warp tells."""
        if gl.program_id(0) < helpers:  # each row of dS has been stored and ordered by now
            o_t = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
            gl.atomic_add(p_words + STORED + o_t * 0, o_t * 0 + 1, mask=o_t == 0, sem="release", scope="gpu")
        mbarrier.arrive(idle.index(0))
        pieces_b = (F0 + F1 + F2) // WIDE * runs_b
        turn = 0
        taken = 0
        piece, first, last, stop = learn(s_piece, told, heard, taken)
        while piece >= 0:
            taken += 1
            if piece < pieces_b:
                _, feature, i_p = place_of_b(piece, S0, S1, S2, F0, F1, F2)
                turn = add_run(
                    s_wide, s_s, full, empty, turn, p_table, p_db, p_stats_b, first, last, stop, units, first_b, feature, i_p, 0,
                    HALF, C, C, RANK, 1, RANK, 1, DEEP,
                )  # fmt: skip
            elif SUMS > 1:
                _, feature, i_p = place_of_a(piece - pieces_b, N, GROUPS_A)
                turn = add_run(
                    s_wide, s_ds, full, empty, turn, p_table, p_da, p_stats_a, first, last, stop, units, first_a, feature, i_p, i_p * RANK,
                    HALF, C_A, C, RANK, PER_A, 1, N, DEEP,
                )  # fmt: skip
            piece, first, last, stop = learn(s_piece, told, heard, taken)


class Sums(NamedTuple):
    """The sums a launch makes: dB, and with ``x`` dA; exact ones.

    Attributes:
        chunks: of the rows. s: [M, columns]. of_b, of_a: where dB [N, rank] and dA [projections * rank, K] are added. x: [M, K] or None.
    """

    chunks: Chunks
    s: torch.Tensor
    of_b: Sink
    x: torch.Tensor | None = None
    of_a: Sink | None = None


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What the kernel is told of the sums: ``columns`` of dS a piece of dA takes, ``groups`` of which lie beside each other, ``per`` projections
    in one; ``runs_b``, ``runs_a``: into how many the rows are cut for dB and dA."""

    columns: int
    groups: int
    per: int
    runs_b: int
    runs_a: int


def pieces_of(layout, outer: int, low, chunks: int, units: int, programs: int, *, with_a: bool) -> Pieces | None:
    """None: kernels of their own have to make the sums. ``outer``: dX's features; ``low``: how dS is made; ``programs``: of the launch.

    Pieces are as long as leaves one a program: each is added by atomics, which cost more than what is gained by shorter ones.
    """
    spans = [*zip(low.starts, low.widths), *([(0, outer)] if with_a else [])]
    if any(start % FEATURES or width % FEATURES for start, width in spans):
        return None
    columns, groups, per = low.columns, 1, 1
    if with_a and layout.columns <= MOST_COLUMNS:
        columns, per = layout.columns, layout.count
    elif with_a:
        columns, groups = layout.padded, layout.count
    blocks = sum(low.widths) // FEATURES, outer // FEATURES * groups if with_a else 1
    return Pieces(columns, groups, per, *(runs_of(chunks, units, programs // count) for count in blocks))
