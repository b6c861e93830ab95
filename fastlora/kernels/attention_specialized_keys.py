"""Attention's dK and dV for Hopper: one warp loads, two warpgroups take a block of 64 keys each (see attention_specialized.py).

A program owns two neighbouring blocks of keys of one key head and walks the queries that look at either: of its document, or where the
two blocks belong to two documents, of both, one after the other. A warpgroup lets those queries go by that do not look at its own block;
so its sums have the order that they would have alone.
"""

from __future__ import annotations

from fastlora.kernels import launch
from fastlora.kernels.attention_specialized import NAME, describe_heads
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    copy_in,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastlora.kernels.tables import attention_specialized_tile

if MISSING is None:
    from fastlora.kernels.attention_specialized import LOG2E, bring
    from fastlora.kernels.ring import ring

    @gluon.jit
    def span_of(p_edges, blocks, block, B: gl.constexpr):
        """Where the walk of a block of keys starts and ends; nowhere for the one after the last, which pads an odd number."""
        start = block * B
        end = start
        if block < blocks:
            end = gl.load(p_edges + blocks + block)
        return start, end

    @gluon.jit
    def work_of(p_edges, blocks, KEY_HEADS: gl.constexpr, B: gl.constexpr):
        """(first block of this program's two, its key head, where the walk over both starts and ends)."""
        block = gl.load(p_edges + 3 * blocks + gl.program_id(0) // KEY_HEADS) * 2
        start, low = span_of(p_edges, blocks, block, B)
        _, high = span_of(p_edges, blocks, block + 1, B)
        return block, gl.program_id(0) % KEY_HEADS, start, gl.maximum(low, high)

    @gluon.jit
    def load_queries(
        d_q, d_k, d_v, d_do, s_q, s_do, s_k, s_v, kv_full, bars, p_edges, blocks,
        KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: keys and values once, then queries and dO of each head of the group."""
        q_full, q_empty, do_full, do_empty = bars
        _, i_h, start, end = work_of(p_edges, blocks, KEY_HEADS, B)
        mbarrier.expect(kv_full, 4 * B * D * 2)
        for i_half in gl.static_range(2):
            copy_in(d_k, [start + i_half * B, i_h * D], kv_full, s_k.index(i_half))
            copy_in(d_v, [start + i_half * B, i_h * D], kv_full, s_v.index(i_half))
        turn = 0
        for i_member in range(GROUPS):
            column = (i_h * GROUPS + i_member) * D
            for i_q in range(start, end, B):
                bring(d_q, i_q, column, s_q, q_full, q_empty, turn, B * D * 2, STAGES)
                bring(d_do, i_q, column, s_do, do_full, do_empty, turn, B * D * 2, STAGES)
                turn += 1

    @gluon.jit
    def let_by(bars, turn, start, end, B: gl.constexpr, STAGES: gl.constexpr):
        """Queries that a warpgroup has no part in."""
        q_full, q_empty, do_full, do_empty = bars
        for _ in range(start, end, B):
            stage = turn % STAGES
            phase = (turn // STAGES) & 1
            mbarrier.wait(q_full.index(stage), phase)
            mbarrier.wait(do_full.index(stage), phase)
            mbarrier.arrive(q_empty.index(stage))
            mbarrier.arrive(do_empty.index(stage))
            turn += 1
        return turn

    @gluon.jit
    def dkv_step(
        b_k, b_v, b_dk, b_dv, s_q, s_do, bars, turn, p_lse, p_delta, at, c,
        DIAGONAL: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """dK (without the scale) and dV after one block of queries; scores are keys by queries, as in attention.py."""
        q_full, q_empty, do_full, do_empty = bars
        scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B, 16])
        values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=values, k_width=2)
        o_q = gl.arange(0, B, gl.SliceLayout(0, scores))
        stage = turn % STAGES
        phase = (turn // STAGES) & 1
        b_lse = gl.load(p_lse + (at + o_q))
        b_zero = gl.zeros((B, B), gl.float32, scores)
        mbarrier.wait(q_full.index(stage), phase)
        b_s = warpgroup_mma(b_k, s_q.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        b_dp = warpgroup_mma(b_v, s_do.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        if DIAGONAL:
            b_s = gl.where(o_q[None, :] >= gl.arange(0, B, gl.SliceLayout(1, scores))[:, None], b_s, float("-inf"))
        b_p = gl.exp2(b_s * c - b_lse[None, :])
        b_half = gl.convert_layout(b_p.to(s_q.dtype), left)
        b_dv = warpgroup_mma(b_half, s_do.index(stage), b_dv, is_async=True)
        b_delta = gl.load(p_delta + (at + o_q))
        b_dp = warpgroup_mma_wait(1, deps=[b_dp])
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(s_q.dtype), left)
        b_dk = warpgroup_mma(b_ds, s_q.index(stage), b_dk, is_async=True)
        b_dv, b_half = warpgroup_mma_wait(1, deps=[b_dv, b_half])
        mbarrier.arrive(do_empty.index(stage))
        b_dk, b_ds = warpgroup_mma_wait(0, deps=[b_dk, b_ds])
        mbarrier.arrive(q_empty.index(stage))
        return b_dk, b_dv

    @gluon.jit
    def dkv_rows(
        HALF: gl.constexpr, p_dk, p_dv, p_lse, p_delta, s_q, s_do, s_k, s_v, kv_full, bars, p_edges, blocks,
        scale, KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
        DK_T: gl.constexpr, DV_T: gl.constexpr,
    ):  # fmt: skip
        """A warpgroup: the first (HALF = 0) or second block of keys."""
        block, i_h, low, high = work_of(p_edges, blocks, KEY_HEADS, B)
        start, end = span_of(p_edges, blocks, block + HALF, B)
        values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
        mbarrier.wait(kv_full, 0)
        b_k = s_k.index(HALF)
        b_v = s_v.index(HALF)
        b_dk = gl.zeros((B, D), gl.float32, values)
        b_dv = gl.zeros((B, D), gl.float32, values)
        c = scale * LOG2E
        turn = 0
        if start < end:
            for i_member in range(GROUPS):
                turn = let_by(bars, turn, low, start, B, STAGES)
                row = (i_h * GROUPS + i_member) * blocks * B
                b_dk, b_dv = dkv_step(
                    b_k, b_v, b_dk, b_dv, s_q, s_do, bars, turn, p_lse, p_delta, row + start, c, True, D, B, STAGES,
                )
                turn += 1
                for i_q in range(start + B, end, B):
                    b_dk, b_dv = dkv_step(
                        b_k, b_v, b_dk, b_dv, s_q, s_do, bars, turn, p_lse, p_delta, row + i_q, c, False, D, B, STAGES,
                    )
                    turn += 1
                turn = let_by(bars, turn, end, high, B, STAGES)
            o_t = (start + gl.arange(0, B, gl.SliceLayout(1, values))).to(gl.int64)[:, None]
            o_d = i_h * D + gl.arange(0, D, gl.SliceLayout(0, values))[None, :]
            gl.store(p_dk + o_t * DK_T + o_d, (b_dk * scale).to(s_q.dtype))
            gl.store(p_dv + o_t * DV_T + o_d, b_dv.to(s_q.dtype))
        else:
            let_by(bars, turn, 0, (high - low) * GROUPS, B, STAGES)

    @gluon.jit(do_not_specialize=["blocks"])
    def dkv_specialized_kernel(
        d_q, d_k, d_v, d_do, p_dk, p_dv, p_lse, p_delta, p_edges, blocks, scale,
        KEY_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
        DK_T: gl.constexpr, DV_T: gl.constexpr,
    ):  # fmt: skip
        """Descriptors as of ``attention_specialized.dq_specialized_kernel``; p_dk, p_dv: element (token, head, d) at token * DK_T + head * D +
        d."""
        s_k = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_k.layout)
        s_v = gl.allocate_shared_memory(d_q.dtype, [2, B, D], d_v.layout)
        s_q = gl.allocate_shared_memory(d_q.dtype, [STAGES, B, D], d_q.layout)
        s_do = gl.allocate_shared_memory(d_q.dtype, [STAGES, B, D], d_do.layout)
        kv_full = ring(1, 1).index(0)
        bars = (ring(STAGES, 1), ring(STAGES, 2), ring(STAGES, 1), ring(STAGES, 2))
        gl.warp_specialize(
            [
                (dkv_rows, (
                    0, p_dk, p_dv, p_lse, p_delta, s_q, s_do, s_k, s_v, kv_full, bars, p_edges, blocks, scale,
                    KEY_HEADS, GROUPS, D, B, STAGES, DK_T, DV_T,
                )),
                (dkv_rows, (
                    1, p_dk, p_dv, p_lse, p_delta, s_q, s_do, s_k, s_v, kv_full, bars, p_edges, blocks, scale,
                    KEY_HEADS, GROUPS, D, B, STAGES, DK_T, DV_T,
                )),
                (load_queries, (
                    d_q, d_k, d_v, d_do, s_q, s_do, s_k, s_v, kv_full, bars, p_edges, blocks,
                    KEY_HEADS, GROUPS, D, B, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def backward_dkv(dout, q, k, v, lse, delta, dk, dv, edges, scale: float) -> bool:
    """Fill dk, dv [Hk, T, D] (views); dout [Hq, T, D]; the others as of ``attention.attention_backward``; False: see ``hopper.attempt``."""
    tile = attention_specialized_tile()
    blocks, key_heads, head = q.shape[1] // tile.bm, k.shape[0], q.shape[2]
    made = describe_heads(tile, (q, k, v, dout))
    return attempt(NAME, lambda: launch.run(
        dkv_specialized_kernel, (launch.cdiv(blocks, 2) * key_heads,), tile,
        *made, dk, dv, lse, delta, edges.table, blocks, float(scale),
        KEY_HEADS=key_heads, GROUPS=q.shape[0] // key_heads, D=head, B=tile.bm, STAGES=tile.stages,
        DK_T=dk.stride(1), DV_T=dv.stride(1),
    ))  # fmt: skip
