"""dX = dY W + D'(dS A) for Hopper (compute capability 9.0): the warp-specialised product with dropout's mask in its epilogue.

The product is that of gemm_specialized.py, the order of sums that of ``gemm.gemm_tma_kernel`` under dropout: each projection's rank-r
product is a sum of its own, masked, scaled and added to the tile, a quarter of the columns at a time. Its blocks lie in the ring until all
four quarters are done. The masks are made while the product runs (gemm_mask.py). In Gluon (see hopper.py).
"""

from __future__ import annotations

import functools

from fastlora.kernels import hopper, launch
from fastlora.kernels.gemm_specialized import WIDEST, blocks_of
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    describe,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NAME = "GEMM with dropout"
OPERANDS = ("d_x", "d_w", "d_s", "d_b", "d_y")


if MISSING is None:
    from fastlora.kernels.gemm_blocks import load_block, load_blocks, quarters, tile_at
    from fastlora.kernels.gemm_mask import keep_quarter, multiply_tile_and_mask
    from fastlora.kernels.ring import leave, ring

    @gluon.jit
    def add_dropped(
        b_part, i_quarter: gl.constexpr, s_x, s_w, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count,
        HALF: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """b_part [64, 64], a quarter of a warpgroup's tile, plus D'(s b') of each of ``count`` projections, whose blocks fill PLACES of the ring
        each from ``turn`` on, DEPTH rank columns a place; b_0 to b_5: the words of their masks."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
        for i_p in range(count):
            b_product = gl.zeros((64, 64), gl.float32, layout)
            for i_place in gl.static_range(PLACES):
                stage = (turn + i_p * PLACES + i_place) % STAGES
                b_s = s_x.index(stage * 2 + HALF).slice(0, DEPTH, dim=1)
                b_b = s_w.index(stage).slice(0, DEPTH, dim=0).slice(i_quarter * 64, 64, dim=1)
                b_product = warpgroup_mma(b_s, b_b, b_product, is_async=True)
            b_product = warpgroup_mma_wait(0, deps=[b_product])
            b_first = gl.where(i_p == 0, b_0, gl.where(i_p == 1, b_2, b_4))
            b_last = gl.where(i_p == 0, b_1, gl.where(i_p == 1, b_3, b_5))
            b_keep = gl.convert_layout(keep_quarter(b_first, b_last, i_quarter), b_part.type.layout)
            b_part += gl.where(b_keep, gl.convert_layout(b_product, b_part.type.layout) * keep_scale, 0.0)
        return b_part

    @gluon.jit
    def add_rank_blocks(
        b_acc, s_x, s_w, full, empty, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count,
        HALF: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """The quarters of b_acc [64, 256] plus D'(s b'), and the ring's turn after its blocks."""
        for i in range(count * PLACES):
            mbarrier.wait(full.index((turn + i) % STAGES), ((turn + i) // STAGES) & 1)
        b_q0, b_q1, b_q2, b_q3 = quarters(b_acc, 64, 256)
        b_q0 = add_dropped(b_q0, 0, s_x, s_w, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q1 = add_dropped(b_q1, 1, s_x, s_w, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q2 = add_dropped(b_q2, 2, s_x, s_w, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q3 = add_dropped(b_q3, 3, s_x, s_w, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        for i in range(count * PLACES):
            mbarrier.arrive(empty.index((turn + i) % STAGES))
        return b_q0, b_q1, b_q2, b_q3, turn + count * PLACES

    @gluon.jit
    def load_tiles(
        d_x, d_w, d_s, d_b, s_x, s_w, full, empty, num_m, count,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: every block of every tile of this program; a projection's rank columns begin a place of the ring."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            turn = load_blocks(d_x, d_w, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, 0, K, BM, BN, BK, STAGES, False)
            for i in range(count * PLACES):
                load_block(d_s, d_b, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, i * DEPTH, BM, BN, BK, STAGES, False)
                turn += 1

    @gluon.jit
    def multiply_tiles(
        HALF: gl.constexpr, p_token, d_y, s_x, s_w, s_y, full, empty, num_m, M, seed0, seed1, seed2, threshold, keep_scale, count,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup: the upper (HALF = 0) or lower rows of every tile of this program."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0 = i_m * BM + HALF * (BM // 2)
            n0 = i_n * BN
            b_acc, turn, b_0, b_1, b_2, b_3, b_4, b_5 = multiply_tile_and_mask(
                s_x, s_w, full, empty, turn, p_token, m0, n0, M, seed0, seed1, seed2, threshold, count, HALF, K, BM, BN, BK, STAGES
            )
            b_q0, b_q1, b_q2, b_q3, turn = add_rank_blocks(
                b_acc, s_x, s_w, full, empty, turn, b_0, b_1, b_2, b_3, b_4, b_5, keep_scale, count, HALF, PLACES, DEPTH, STAGES
            )
            b_parts = (b_q0, b_q1, b_q2, b_q3)
            for i_quarter in gl.static_range(4):
                leave(b_parts[i_quarter], d_y, s_y.index(HALF * 2 + i_quarter % 2), m0, n0 + i_quarter * (BN // 4), 1)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold", "count"])
    def gemm_dropout_kernel(
        d_x, d_w, d_s, d_b, d_y, p_token, M, seed0: gl.int64, seed1: gl.int64, seed2: gl.int64, threshold: gl.int64, keep_scale, count,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K]; d_w [K, N]; d_s [M, LR]; d_b [LR, N]; d_y [M, N]: descriptors as of ``gemm_specialized_kernel``. The columns of each
        of ``count`` projections, told as the program runs or the compiler would spill, fill PLACES blocks of DEPTH. p_token int64 [M]; seeds, threshold and scale as of :class:`fastlora.kernels.launch.Dropout`."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BK, BN], d_w.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        full, empty = ring(STAGES, 1), ring(STAGES, 2)
        num_m = (M + BM - 1) // BM
        gl.warp_specialize(
            [
                (multiply_tiles, (
                    0, p_token, d_y, s_x, s_w, s_y, full, empty, num_m, M, seed0, seed1, seed2, threshold, keep_scale, count,
                    N, K, PLACES, DEPTH, BM, BN, BK, STAGES, GROUP,
                )),
                (multiply_tiles, (
                    1, p_token, d_y, s_x, s_w, s_y, full, empty, num_m, M, seed0, seed1, seed2, threshold, keep_scale, count,
                    N, K, PLACES, DEPTH, BM, BN, BK, STAGES, GROUP,
                )),
                (load_tiles, (
                    d_x, d_w, d_s, d_b, s_x, s_w, full, empty, num_m, count, N, K, PLACES, DEPTH, BM, BN, BK, STAGES, GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def places_of(count: int, padded: int, tile) -> tuple[int, int] | None:
    """(places of the ring that a projection's rank columns fill, columns in each), or None where the ring has not enough for all."""
    places, depth = launch.cdiv(padded, tile.bk), min(padded, tile.bk)
    return (places, depth) if count * places <= tile.stages else None


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, inner, outer, stored, padded, count, dtype, device) -> launch.Launch | None:
    """What a product's shape decides, or None where another kernel computes it; ``count`` projections of ``padded`` rank columns."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, inner, outer)):
        return None
    tile = launch.gemm_specialized_tile(rows, outer, launch.persistent_programs(device))
    places = places_of(count, padded, tile)
    if tile.bn != WIDEST or places is None:
        return None
    wide = {"d_x": inner, "d_w": outer, "d_s": stored, "d_b": outer, "d_y": outer}
    blocks = blocks_of(tile, transposed=False)
    made = tuple(launch.describer(dtype, wide[name], *blocks[name], describe) for name in OPERANDS)
    tiles = launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
    return launch.Launch(
        gemm_dropout_kernel, (launch.even_programs(tiles, device),), tile, made,
        N=outer, K=inner, PLACES=places[0], DEPTH=places[1], BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip


def run(dy, weight, ds, a, out, dropout: launch.Dropout, padded: int) -> bool:
    """out [M, K] = dy [M, N] weight [N, K] + D'(ds a), ``padded`` rank columns a projection; False: another kernel has to."""
    if not hopper.compiles(NAME):
        return False
    rows, inner = dy.shape
    made = plan(rows, inner, out.shape[1], ds.shape[1], padded, len(dropout.seeds), dy.dtype, dy.device)
    if made is None:
        return False
    drop = launch.dropout_arguments(dropout, dy)
    return attempt(NAME, made, dy, weight, ds, a, out, drop.tokens, rows, *drop.seeds, drop.threshold, drop.keep_scale, len(dropout.seeds))
