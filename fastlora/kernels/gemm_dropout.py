"""dX = dY W + D'(dS A) for Hopper (compute capability 9.0): the warp-specialised product with dropout's mask in its epilogue.

The product is that of gemm_specialized.py, the order of sums that of ``gemm.gemm_tma_kernel`` under dropout: each projection's rank-r
product is a sum of its own, masked, scaled and added to the tile, a quarter of the columns at a time. Its blocks lie in the ring until all
four quarters are done. The masks are read as bits (gemm_mask.py). In Gluon (see hopper.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastlora.kernels import gemm_beside, hopper, launch, project_beside
from fastlora.kernels.gemm_specialized import WIDEST, blocks_of
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    describe,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastlora.kernels.masks import masks

NAME = "GEMM with dropout"
OPERANDS = ("d_x", "d_w", "d_s", "d_b", "d_f", "d_y")


if MISSING is None:
    from fastlora.kernels.gemm_blocks import load_block, load_blocks, multiply_tile, quarters, tile_at
    from fastlora.kernels.gemm_mask import keep_quarter, read_mask, words_of_quarters
    from fastlora.kernels.project_beside import await_low, load_low, multiply_low
    from fastlora.kernels.ring import leave, ring

    @gluon.jit
    def add_dropped(
        b_part, i_quarter: gl.constexpr, s_x, s_w, turn, b_0, b_1, b_2, keep_scale, count,
        HALF: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """b_part [64, 64], a quarter of a warpgroup's tile, plus D'(s b') of each of ``count`` projections, whose blocks fill PLACES of the ring
        each from ``turn`` on, DEPTH rank columns a place; b_0 to b_2: the words of their masks."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
        for i_p in range(count):
            b_product = gl.zeros((64, 64), gl.float32, layout)
            for i_place in gl.static_range(PLACES):
                stage = (turn + i_p * PLACES + i_place) % STAGES
                b_s = s_x.index(stage * 2 + HALF).slice(0, DEPTH, dim=1)
                b_b = s_w.index(stage).slice(0, DEPTH, dim=0).slice(i_quarter * 64, 64, dim=1)
                b_product = warpgroup_mma(b_s, b_b, b_product, is_async=True)
            b_product = warpgroup_mma_wait(0, deps=[b_product])
            b_words = gl.where(i_p == 0, b_0, gl.where(i_p == 1, b_1, b_2))
            b_keep = gl.convert_layout(keep_quarter(b_words), b_part.type.layout)
            b_part += gl.where(b_keep, gl.convert_layout(b_product, b_part.type.layout) * keep_scale, 0.0)
        return b_part

    @gluon.jit
    def read_masks(p_bits, m0, n0, M, count, WIDTH: gl.constexpr):
        """The words of three masks, zeros behind the ``count``-th."""
        return (
            read_mask(p_bits, 0, m0, n0, M, True, WIDTH), read_mask(p_bits, 1, m0, n0, M, count > 1, WIDTH),
            read_mask(p_bits, 2, m0, n0, M, count > 2, WIDTH),
        )  # fmt: skip

    @gluon.jit
    def add_rank_blocks(
        b_acc, s_x, s_w, full, empty, turn, b_mask0, b_mask1, b_mask2, keep_scale, count,
        HALF: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """The quarters of b_acc [64, 256] plus D'(s b') with the masks of :func:`read_masks`, and the ring's turn after its blocks."""
        for i in range(count * PLACES):
            mbarrier.wait(full.index((turn + i) % STAGES), ((turn + i) // STAGES) & 1)
        b_q0, b_q1, b_q2, b_q3 = quarters(b_acc, 64, 256)
        b_00, b_01, b_02, b_03 = words_of_quarters(b_mask0)
        b_10, b_11, b_12, b_13 = words_of_quarters(b_mask1)
        b_20, b_21, b_22, b_23 = words_of_quarters(b_mask2)
        b_q0 = add_dropped(b_q0, 0, s_x, s_w, turn, b_00, b_10, b_20, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q1 = add_dropped(b_q1, 1, s_x, s_w, turn, b_01, b_11, b_21, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q2 = add_dropped(b_q2, 2, s_x, s_w, turn, b_02, b_12, b_22, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        b_q3 = add_dropped(b_q3, 3, s_x, s_w, turn, b_03, b_13, b_23, keep_scale, count, HALF, PLACES, DEPTH, STAGES)
        for i in range(count * PLACES):
            mbarrier.arrive(empty.index((turn + i) % STAGES))
        return b_q0, b_q1, b_q2, b_q3, turn + count * PLACES

    @gluon.jit
    def load_tiles(
        d_x, d_w, d_s, d_b, d_f, p_ready, s_x, s_w, s_rows, s_f, full, empty, num_m, count, helpers,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BESIDE: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr,
        S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr,
        BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: every block of every tile of this program; a projection's rank columns begin a place of the ring. BESIDE: the
        first ``helpers`` programs make s (project_beside.py)."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        if BESIDE:  # noqa: SIM102 - decided when compiled, the other when run
            if gl.program_id(0) < helpers:
                load_low(d_x, d_f, s_rows, s_f, full, empty, num_m, helpers, S0, S1, S2, F0, F1, F2, GROUPS, C, BM, BK, DEEP, False)
        turn = 0
        for tile in range(first_tile(num_m * num_n, helpers), num_m * num_n, gl.num_programs(0) - helpers):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            turn = load_blocks(d_x, d_w, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, 0, K, BM, BN, BK, STAGES, False)
            if BESIDE:
                await_low(p_ready, i_m, num_n)
            for i in range(count * PLACES):
                load_block(d_s, d_b, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, i * DEPTH, BM, BN, BK, STAGES, False)
                turn += 1

    @gluon.jit
    def first_tile(tiles, helpers):
        """The first tile of this program; of one that makes s none."""
        return gl.where(gl.program_id(0) < helpers, tiles, gl.program_id(0) - helpers)

    @gluon.jit
    def multiply_tiles(
        HALF: gl.constexpr, p_bits, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, M, keep_scale, count, helpers,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BESIDE: gl.constexpr, LR: gl.constexpr,
        SUM: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr,
        BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup: the upper (HALF = 0) or lower rows of every tile of this program, or of its rows of s."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        if BESIDE:  # noqa: SIM102 - decided when compiled, the other when run
            if gl.program_id(0) < helpers:
                multiply_low(
                    HALF, p_low, p_scale, p_ready, s_rows, s_f, full, empty, num_m, helpers, M,
                    LR, SUM, F0, F1, F2, GROUPS, C, BM, BK, DEEP, False,
                )  # fmt: skip
        turn = 0
        for tile in range(first_tile(num_m * num_n, helpers), num_m * num_n, gl.num_programs(0) - helpers):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0 = i_m * BM + HALF * (BM // 2)
            n0 = i_n * BN
            b_mask0, b_mask1, b_mask2 = read_masks(p_bits, m0, n0, M, count, (N + 63) // 64 * 2)
            b_acc, turn = multiply_tile(s_x, s_w, full, empty, turn, HALF, K, 0, BM, BN, BK, STAGES, False)
            b_q0, b_q1, b_q2, b_q3, turn = add_rank_blocks(
                b_acc, s_x, s_w, full, empty, turn, b_mask0, b_mask1, b_mask2, keep_scale, count, HALF, PLACES, DEPTH, STAGES
            )
            b_parts = (b_q0, b_q1, b_q2, b_q3)
            for i_quarter in gl.static_range(4):
                leave(b_parts[i_quarter], d_y, s_y.index(HALF * 2 + i_quarter % 2), m0, n0 + i_quarter * (BN // 4), 1)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M", "count", "helpers"])
    def gemm_dropout_kernel(
        d_x, d_w, d_s, d_b, d_f, d_y, p_low, p_scale, p_ready, p_bits, M, keep_scale, count, helpers,
        N: gl.constexpr, K: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, BESIDE: gl.constexpr, LR: gl.constexpr,
        SUM: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr,
        GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K]; d_w [K, N]; d_s [M, LR]; d_b [LR, N]; d_y [M, N]: descriptors as of ``gemm_specialized_kernel``. The columns of each
        of ``count`` projections, told as the program runs or the compiler would spill, fill PLACES blocks of DEPTH. p_bits: of
        :func:`fastlora.kernels.masks.masks`; keep_scale as of :class:`fastlora.kernels.launch.Dropout`. BESIDE: s is made too; d_f, p_low, p_scale, p_ready as of
        ``gemm_beside_kernel``."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BK, BN], d_w.layout)
        DEEP: gl.constexpr = STAGES * BN // BM
        s_rows, s_f = s_w, s_x
        if BESIDE:
            s_rows = reinterpret(s_w, d_x.dtype, [DEEP * 2, BM // 2, BK], d_x.layout)
            s_f = reinterpret(s_x, d_f.dtype, [STAGES * BM // C, BK, C], d_f.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        full, empty = ring(DEEP, 1), ring(DEEP, 2)
        num_m = (M + BM - 1) // BM
        gl.warp_specialize(
            [
                (multiply_tiles, (
                    0, p_bits, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, M, keep_scale, count, helpers,
                    N, K, PLACES, DEPTH, BESIDE, LR, SUM, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
                (multiply_tiles, (
                    1, p_bits, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, M, keep_scale, count, helpers,
                    N, K, PLACES, DEPTH, BESIDE, LR, SUM, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
                (load_tiles, (
                    d_x, d_w, d_s, d_b, d_f, p_ready, s_x, s_w, s_rows, s_f, full, empty, num_m, count, helpers,
                    N, K, PLACES, DEPTH, BESIDE, S0, S1, S2, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def places_of(count: int, padded: int, tile) -> tuple[int, int] | None:
    """(places of the ring that a projection's rank columns fill, columns in each), or None where the ring has not enough for all."""
    places, depth = launch.cdiv(padded, tile.bk), min(padded, tile.bk)
    return (places, depth) if count * places <= tile.stages else None


class Plan(NamedTuple):
    """What a product's shape decides: the launch, and how many of its programs make dS."""

    launch: launch.Launch
    helpers: int


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, inner, outer, layout, beside, dtype, device) -> Plan | None:
    """None: another kernel has to. ``beside``: dS is to be made in the launch too."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, inner, outer)):
        return None
    tile = launch.gemm_specialized_tile(rows, outer, launch.persistent_programs(device))
    places = places_of(layout.count, layout.padded, tile)
    if tile.bn != WIDEST or places is None:
        return None
    low, helpers = project_beside.low_of(layout, inner, dtype, arch, transposed=False, whole=True), 0
    if beside:
        helpers = project_beside.helpers(low, rows, outer, tile, device, transposed=False)
        if not helpers:
            return None
    wide = {"d_x": inner, "d_w": outer, "d_s": layout.columns, "d_b": outer, "d_f": layout.columns, "d_y": outer}
    blocks = blocks_of(tile, transposed=False) | {"d_f": gemm_beside.factor_block(low, tile, transposed=False)}
    described = tuple(None if name == "d_f" and not beside else launch.describer(dtype, wide[name], *blocks[name], describe) for name in OPERANDS)
    tiles = launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
    made = launch.Launch(
        gemm_dropout_kernel, (launch.even_programs(tiles, device) + helpers,), tile, described,
        N=outer, K=inner, PLACES=places[0], DEPTH=places[1], BESIDE=beside, LR=layout.columns, **low.constants(),
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip
    return Plan(made, helpers)


def run(dy, weight, ds, a, out, dropout: launch.Dropout, layout) -> bool:
    """out [M, K] = dy [M, N] weight [N, K] + D'(ds a); False: another kernel has to."""
    made = plan(*dy.shape, out.shape[1], layout, False, dy.dtype, dy.device) if hopper.compiles(NAME) else None
    return made is not None and _launch(made, dy, weight, ds, a, a, out, ds, ds, ds, dropout)


def run_with_low(dy, weight, b, a, dropout: launch.Dropout, layout):
    """(dx [M, K] as of :func:`run`, ds [M, columns] of b [N, columns]) in one launch, or None where two kernels have to."""
    rows, inner = dy.shape
    outer = weight.shape[1]
    if rows * inner * outer < project_beside.LEAST or not hopper.compiles(NAME):
        return None
    made = plan(rows, inner, outer, layout, True, dy.dtype, dy.device)
    ready = None if made is None else project_beside.words(dy.device)
    if ready is None:
        return None
    out, ds = launch.empty(dy, rows, outer), launch.empty(dy, rows, layout.columns)
    done = _launch(made, dy, weight, ds, a, b, out, ds, layout.scale_of_columns(dy.device), ready, dropout)
    return (out, ds) if done else None


def _launch(made, dy, weight, ds, a, b, out, low, scales, ready, dropout: launch.Dropout) -> bool:
    bits = masks(dropout, out.shape[1])
    return attempt(
        NAME, made.launch, dy, weight, ds, a, b, out, low, scales, ready, bits, dy.shape[0], dropout.keep_scale, len(dropout.seeds), made.helpers,
    )  # fmt: skip
