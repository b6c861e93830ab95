"""Attention's forward and dQ for Hopper (compute capability 9.0): one warp loads, two warpgroups take a head each.

Products, blocks and order of sums are those of attention.py, so are the bits; what differs is who waits for whom. A tile is a block of 64
queries of two heads that share their keys: a warp of its own brings keys and values once for both by bulk copies (TMA), into a
ring of STAGES blocks, and runs ahead into the next tile. Each warpgroup works out its head's rows; while one is at its exponentials, the
tensor cores have the other's products, and its own: those of the next scores run beside those of the last values. A persistent grid takes
the tiles in the order of their walks' lengths, longest first.

Source: Shah et al., "FlashAttention-3" (2024), warp specialisation and overlap within a warpgroup; here in Gluon (see hopper.py), with
documents for bounds and heads for halves.
"""

from __future__ import annotations

import torch

from fastlora.kernels import launch
from fastlora.kernels.edges import Edges
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    copy_in,
    describe,
    gl,
    gluon,
    mbarrier,
    tma,
    usable,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastlora.kernels.tables import attention_specialized_tile

NAME = "attention"
HEADS_WIDE = (64, 128)

if MISSING is None:
    from fastlora.kernels.ring import claim, leave, ring

    LOG2E = gl.constexpr(1.4426950408889634)

    @gluon.jit
    def tile_of(turn, total, PROGRAMS: gl.constexpr):
        """The tile of this program's ``turn``-th turn: every other round runs backwards, or the same programs got each round's longest."""
        place = gl.program_id(0)
        return turn * PROGRAMS + gl.where(turn % 2 == 0, place, PROGRAMS - 1 - place)

    @gluon.jit
    def walk_of(p_edges, blocks, tile, HEADS: gl.constexpr):
        """(block of queries, the first of its two heads, where its document starts)."""
        i_q = gl.load(p_edges + 2 * blocks + tile // (HEADS // 2))
        return i_q, tile % (HEADS // 2) * 2, gl.load(p_edges + i_q)

    @gluon.jit
    def bring(descriptor, row, column, place, full, empty, turn, BYTES: gl.constexpr, STAGES: gl.constexpr):
        """Copy a block into the ring's next place, once it is free."""
        stage, bar = claim(full, empty, turn, BYTES, STAGES)
        copy_in(descriptor, [row, column], bar, place.index(stage))

    @gluon.jit
    def load_walks(
        d_q, d_k, d_v, d_do, s_q, s_do, s_k, s_v, bars, p_edges, blocks, total,
        WITH_DO: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
        PROGRAMS: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: the queries of every tile (and dO, WITH_DO), and the keys and values that they look at: the diagonal's block,
        then all before it from the document's start."""
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
        turn = 0
        seen = 0
        for i in range((total + PROGRAMS - 1) // PROGRAMS):
            tile = tile_of(i, total, PROGRAMS)
            if tile < total:
                i_q, head, first = walk_of(p_edges, blocks, tile, HEADS)
                mbarrier.wait(q_empty, (seen & 1) ^ 1)
                mbarrier.expect(q_full, (4 if WITH_DO else 2) * B * D * 2)
                for i_h in gl.static_range(2):
                    copy_in(d_q, [i_q * B, (head + i_h) * D], q_full, s_q.index(i_h))
                    if WITH_DO:
                        copy_in(d_do, [i_q * B, (head + i_h) * D], q_full, s_do.index(i_h))
                seen += 1
                column = head // GROUPS * D
                for i_b in range((i_q * B - first) // B + 1):
                    row = gl.where(i_b == 0, i_q * B, first + (i_b - 1) * B)
                    bring(d_k, row, column, s_k, k_full, k_empty, turn, B * D * 2, STAGES)
                    bring(d_v, row, column, s_v, v_full, v_empty, turn, B * D * 2, STAGES)
                    turn += 1

    @gluon.jit
    def begin(b_a, s_b, full, turn, SCORES: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr):
        """b_a [B, D] times the transposed block of the ring, once it has arrived: [B, B], left running."""
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        b_zero = gl.zeros((B, B), gl.float32, SCORES)
        return warpgroup_mma(b_a, s_b.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)

    @gluon.jit
    def hide_later(b_s, SCORES: gl.constexpr, B: gl.constexpr):
        """Scores of the diagonal's block: minus infinity where a key comes after its query."""
        o_q = gl.arange(0, B, gl.SliceLayout(1, SCORES))
        o_k = gl.arange(0, B, gl.SliceLayout(0, SCORES))
        return gl.where(o_q[:, None] >= o_k[None, :], b_s, float("-inf"))

    @gluon.jit
    def forward_rows(
        HALF: gl.constexpr, d_out, p_lse, s_q, s_k, s_v, s_out, bars, p_edges, blocks, total, scale,
        HEADS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    ):  # fmt: skip
        """A warpgroup of the forward: the first (HALF = 0) or second head of every tile of this program."""
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
        scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B, 16])
        values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=values, k_width=2)
        rows: gl.constexpr = gl.SliceLayout(1, values)
        c = scale * LOG2E
        turn = 0
        seen = 0
        for i in range((total + PROGRAMS - 1) // PROGRAMS):
            tile = tile_of(i, total, PROGRAMS)
            if tile < total:
                i_q, head, first = walk_of(p_edges, blocks, tile, HEADS)
                head += HALF
                mbarrier.wait(q_full, seen & 1)
                seen += 1
                b_q = s_q.index(HALF)
                b_s = begin(b_q, s_k, k_full, turn, scores, B, STAGES)
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                mbarrier.arrive(k_empty.index(turn % STAGES))
                b_s = hide_later(b_s, scores, B)
                b_max = gl.max(b_s, 1) * c
                b_e = gl.exp2(b_s * c - b_max[:, None])
                b_sum = gl.sum(b_e, 1)
                b_p = gl.convert_layout(b_e.to(d_out.dtype), left)
                b_acc = gl.zeros((B, D), gl.float32, values)
                for _ in range((i_q * B - first) // B):
                    before = turn % STAGES
                    phase = (turn // STAGES) & 1
                    turn += 1
                    b_s = begin(b_q, s_k, k_full, turn, scores, B, STAGES)
                    mbarrier.wait(v_full.index(before), phase)
                    b_acc = warpgroup_mma(b_p, s_v.index(before), b_acc, is_async=True)
                    b_s = warpgroup_mma_wait(1, deps=[b_s])
                    mbarrier.arrive(k_empty.index(turn % STAGES))
                    b_new = gl.maximum(b_max, gl.max(b_s, 1) * c)
                    b_e = gl.exp2(b_s * c - b_new[:, None])
                    b_old = gl.exp2(b_max - b_new)
                    b_sum = b_sum * b_old + gl.sum(b_e, 1)
                    b_max = b_new
                    # named here, the exponentials are taken before the wait, beside the product
                    b_acc, b_e, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_e, b_p])
                    mbarrier.arrive(v_empty.index(before))
                    b_acc = b_acc * gl.convert_layout(b_old, rows)[:, None]
                    b_p = gl.convert_layout(b_e.to(d_out.dtype), left)
                mbarrier.arrive(q_empty)
                stage = turn % STAGES
                mbarrier.wait(v_full.index(stage), (turn // STAGES) & 1)
                b_acc = warpgroup_mma(b_p, s_v.index(stage), b_acc, is_async=True)
                o_q = i_q * B + gl.arange(0, B, gl.SliceLayout(1, scores))
                gl.store(p_lse + head * blocks * B + o_q, b_max + gl.log2(b_sum))
                b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
                mbarrier.arrive(v_empty.index(stage))
                turn += 1
                b_out = b_acc * gl.convert_layout(1.0 / b_sum, rows)[:, None]
                leave(b_out, d_out, s_out.index(HALF), i_q * B, head * D, 0)
        tma.store_wait(0)

    @gluon.jit
    def dq_step(
        b_q, b_do, b_lse, b_delta, b_acc, b_ds, s_k, s_v, bars, turn, c,
        DIAGONAL: gl.constexpr, SCORES: gl.constexpr, LEFT: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """dQ (without the scale) after one block of keys, its product left running. The diagonal's block is the first: there is no product
        before it to wait for."""
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
        stage = turn % STAGES
        b_s = begin(b_q, s_k, k_full, turn, SCORES, B, STAGES)
        b_dp = begin(b_do, s_v, v_full, turn, SCORES, B, STAGES)
        if DIAGONAL:
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            b_s = hide_later(b_s, SCORES, B)
        else:
            b_acc, b_s, b_ds = warpgroup_mma_wait(1, deps=[b_acc, b_s, b_ds])
            mbarrier.arrive(k_empty.index((turn + STAGES - 1) % STAGES))
        b_p = gl.exp2(b_s * c - b_lse[:, None])
        b_dp, b_p = warpgroup_mma_wait(0, deps=[b_dp, b_p])
        mbarrier.arrive(v_empty.index(stage))
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(s_k.dtype), LEFT)
        b_acc = warpgroup_mma(b_ds, s_k.index(stage), b_acc, is_async=True)
        return warpgroup_mma_wait(1, deps=[b_acc, b_ds])

    @gluon.jit
    def dq_rows(
        HALF: gl.constexpr, d_dq, p_lse, p_delta, s_q, s_do, s_k, s_v, s_out, bars, p_edges, blocks, total, scale,
        HEADS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    ):  # fmt: skip
        """A warpgroup of dQ: as :func:`forward_rows`."""
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
        scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B, 16])
        values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=values, k_width=2)
        c = scale * LOG2E
        turn = 0
        seen = 0
        for i in range((total + PROGRAMS - 1) // PROGRAMS):
            tile = tile_of(i, total, PROGRAMS)
            if tile < total:
                i_q, head, first = walk_of(p_edges, blocks, tile, HEADS)
                head += HALF
                o_q = head * blocks * B + i_q * B + gl.arange(0, B, gl.SliceLayout(1, scores))
                b_lse = gl.load(p_lse + o_q)
                b_delta = gl.load(p_delta + o_q)
                mbarrier.wait(q_full, seen & 1)
                seen += 1
                b_q = s_q.index(HALF)
                b_do = s_do.index(HALF)
                b_acc = gl.zeros((B, D), gl.float32, values)
                b_ds = gl.zeros((B, B), d_dq.dtype, left)
                b_acc, b_ds = dq_step(
                    b_q, b_do, b_lse, b_delta, b_acc, b_ds, s_k, s_v, bars, turn, c, True, scores, left, B, STAGES,
                )
                for _ in range((i_q * B - first) // B):
                    turn += 1
                    b_acc, b_ds = dq_step(
                        b_q, b_do, b_lse, b_delta, b_acc, b_ds, s_k, s_v, bars, turn, c, False, scores, left, B, STAGES,
                    )
                mbarrier.arrive(q_empty)
                b_acc, b_ds = warpgroup_mma_wait(0, deps=[b_acc, b_ds])
                mbarrier.arrive(k_empty.index(turn % STAGES))
                turn += 1
                leave(b_acc * scale, d_dq, s_out.index(HALF), i_q * B, head * D, 0)
        tma.store_wait(0)

    @gluon.jit
    def rings(d_k, d_v, B: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
        """Places of keys and of values, the barriers of a tile's queries, and those of both rings: full and empty."""
        s_k = gl.allocate_shared_memory(d_k.dtype, [STAGES, B, D], d_k.layout)
        s_v = gl.allocate_shared_memory(d_v.dtype, [STAGES, B, D], d_v.layout)
        q_full, q_empty = ring(1, 1).index(0), ring(1, 2).index(0)
        k_full, k_empty, v_full, v_empty = ring(STAGES, 1), ring(STAGES, 2), ring(STAGES, 1), ring(STAGES, 2)
        return s_k, s_v, (q_full, q_empty, k_full, k_empty, v_full, v_empty)

    @gluon.jit(do_not_specialize=["blocks", "total"])
    def forward_specialized_kernel(
        d_q, d_k, d_v, d_out, p_lse, p_edges, blocks, total, scale,
        HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    ):  # fmt: skip
        """d_q, d_out [T, HEADS D], d_k, d_v [T, HEADS / GROUPS D]: descriptors of blocks [B, D]; p_lse fp32 [HEADS, T], log2; p_edges int32
        [4, blocks]: see edges.py."""
        s_q = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_q.layout)
        s_out = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_out.layout)
        s_k, s_v, bars = rings(d_k, d_v, B, D, STAGES)
        # Registers: 240 a thread for the two that multiply, 24 for the one that loads.
        gl.warp_specialize(
            [
                (forward_rows, (
                    0, d_out, p_lse, s_q, s_k, s_v, s_out, bars, p_edges, blocks, total, scale, HEADS, D, B, STAGES, PROGRAMS,
                )),
                (forward_rows, (
                    1, d_out, p_lse, s_q, s_k, s_v, s_out, bars, p_edges, blocks, total, scale, HEADS, D, B, STAGES, PROGRAMS,
                )),
                (load_walks, (
                    d_q, d_k, d_v, d_q, s_q, s_q, s_k, s_v, bars, p_edges, blocks, total, False, HEADS, GROUPS, D, B, STAGES, PROGRAMS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip

    @gluon.jit(do_not_specialize=["blocks", "total"])
    def dq_specialized_kernel(
        d_q, d_k, d_v, d_do, d_dq, p_lse, p_delta, p_edges, blocks, total, scale,
        HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    ):  # fmt: skip
        """As :func:`forward_specialized_kernel`; d_do and d_dq as d_q; p_delta fp32 [HEADS, T]: rowsum(dO * O)."""
        s_q = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_q.layout)
        s_do = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_do.layout)
        s_out = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_dq.layout)
        s_k, s_v, bars = rings(d_k, d_v, B, D, STAGES)
        gl.warp_specialize(
            [
                (dq_rows, (
                    0, d_dq, p_lse, p_delta, s_q, s_do, s_k, s_v, s_out, bars, p_edges, blocks, total, scale,
                    HEADS, D, B, STAGES, PROGRAMS,
                )),
                (dq_rows, (
                    1, d_dq, p_lse, p_delta, s_q, s_do, s_k, s_v, s_out, bars, p_edges, blocks, total, scale,
                    HEADS, D, B, STAGES, PROGRAMS,
                )),
                (load_walks, (
                    d_q, d_k, d_v, d_do, s_q, s_do, s_k, s_v, bars, p_edges, blocks, total, True, HEADS, GROUPS, D, B, STAGES, PROGRAMS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: Edges, window, softcap, *others: torch.Tensor) -> bool:
    """Whether these kernels compute this attention: heads in pairs that share their keys, [T, D] of a head beside the next one's (in
    ``others`` too); plain. Short walks are left to the portable kernels: a tile's beginning and end are most of it (documents of one block,
    H200: 110 us against 81)."""
    head = q.shape[2]
    plain = not edges.short and window is None and softcap is None and head in HEADS_WIDE and head == v.shape[2] and q.dtype != torch.float32
    paired = q.shape[0] // k.shape[0] % 2 == 0 and all(t.stride(0) == head or t.shape[0] == 1 for t in (q, k, v, *others))
    return plain and paired and usable(launch.arch_of(q), NAME)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[H, T, D] with adjacent heads as rows [T, H D]."""
    heads, tokens, head = tensor.shape
    return tensor.as_strided((tokens, heads * head), (tensor.stride(1), 1))


def describe_heads(tile, tensors: tuple[torch.Tensor, ...]) -> list:
    """Descriptors of [H, T, D] tensors for blocks of a head."""
    return [launch.descriptor(flat(t), tile.bm, t.shape[2], make=describe) for t in tensors]


def _walk(kernel, tensors: tuple[torch.Tensor, ...], sums: tuple[torch.Tensor, ...], edges: Edges, scale: float) -> bool:
    """Launch one of the two walks over keys on a persistent grid; ``tensors`` [H, T, D] begin with q and k."""
    tile, (heads, tokens, head) = attention_specialized_tile(), tensors[0].shape
    programs = launch.persistent_programs(tensors[0].device)
    total = tokens // tile.bm * (heads // 2)
    return attempt(NAME, lambda: launch.run(
        kernel, (min(programs, total),), tile, *describe_heads(tile, tensors), *sums, edges.table, tokens // tile.bm, total, float(scale),
        HEADS=heads, GROUPS=heads // tensors[1].shape[0], D=head, B=tile.bm, STAGES=tile.stages, PROGRAMS=programs,
    ))  # fmt: skip


def forward(q, k, v, out, lse, edges: Edges, scale: float) -> bool:
    """Fill out [Hq, T, D] (a view) and lse; arguments as of ``attention.attention_forward``; False: see ``hopper.attempt``."""
    return _walk(forward_specialized_kernel, (q, k, v, out), (lse,), edges, scale)


def backward_dq(dout, q, k, v, lse, delta, dq, edges: Edges, scale: float) -> bool:
    """Fill dq [Hq, T, D] (a view); dout [Hq, T, D]; the others as of ``attention.attention_backward``; False: see ``hopper.attempt``."""
    return _walk(dq_specialized_kernel, (q, k, v, dout, dq), (lse, delta), edges, scale)
