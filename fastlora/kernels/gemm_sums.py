"""dX = dY W + dS A with dS and the sums over tokens dB and dA in its own launch, for Hopper (compute capability 9.0).

The launch of gemm_beside.py, whose programs then share out the sums (sums_beside.py). Bits are those of the kernels apart.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastlora.kernels import gemm_beside, launch, project_beside, sums_beside
from fastlora.kernels.hopper import MISSING, attempt, compiles, describe, gl, gluon, reinterpret
from fastlora.kernels.sums_beside import FEATURES, UNIT, Sums

NAME = "GEMM with sums over tokens"
# The kernel's described tensors: those of gemm_beside.py, and what the sums read in other blocks.
OPERANDS = (*gemm_beside.OPERANDS, "d_dy", "d_of_b", "d_in", "d_of_a")


if MISSING is None:
    from fastlora.kernels.gemm_beside import load_either, multiply_either
    from fastlora.kernels.ring import ring
    from fastlora.kernels.sums_beside import add_sums, load_sums

    @gluon.jit
    def load_all(
        d_x, d_w, d_s, d_b, d_f, d_dy, d_of_b, d_in, d_of_a, p_ready, p_words, p_table, s_x, s_w, s_rows, s_f, s_wide, s_of_b, s_of_a, s_piece,
        full, empty, idle, told, heard, full_sums, empty_sums, num_m, helpers, M, units, runs_b, runs_a,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr,
        F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, SUMS: gl.constexpr, C_A: gl.constexpr,
        GROUPS_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: dS or tiles, then sums."""
        load_either(
            d_x, d_w, d_s, d_b, d_f, p_ready, s_x, s_w, s_rows, s_f, full, empty, num_m, helpers,
            N, K, R, 0, 0, S0, S1, S2, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, False, GROUP,
        )  # fmt: skip
        load_sums(
            d_dy, d_of_b, d_in, d_of_a, p_words, p_table, s_piece, s_wide, s_of_b, s_of_a, idle, told, heard, full_sums, empty_sums,
            helpers, M, units, runs_b, runs_a, N, SUMS, S0, S1, S2, F0, F1, F2, C, GROUPS_A, C_A, STAGES,
        )  # fmt: skip

    @gluon.jit
    def multiply_all(
        HALF: gl.constexpr, d_y, p_low, p_scale, p_ready, p_words, p_db, p_stats_b, p_da, p_stats_a, p_table,
        s_x, s_w, s_rows, s_f, s_y, s_wide, s_of_b, s_of_a, s_piece, full, empty, idle, told, heard, full_sums, empty_sums,
        num_m, helpers, M, units, runs_b, first_b, first_a,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, LR: gl.constexpr, SUM: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr,
        S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, SUMS: gl.constexpr,
        RANK: gl.constexpr, C_A: gl.constexpr, GROUPS_A: gl.constexpr, PER_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup: dS or tiles, then sums."""
        multiply_either(
            HALF, p_low, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, helpers, M,
            N, K, R, False, LR, SUM, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, False, GROUP,
        )  # fmt: skip
        add_sums(
            HALF, p_words, p_db, p_stats_b, p_da, p_stats_a, p_table, s_piece, s_wide, s_of_b, s_of_a, idle, told, heard, full_sums, empty_sums,
            helpers, units, runs_b, first_b, first_a, N, S0, S1, S2, F0, F1, F2, C, RANK, SUMS, GROUPS_A, C_A, PER_A, STAGES,
        )  # fmt: skip

    @gluon.jit(do_not_specialize=["M", "helpers", "units", "runs_b", "runs_a", "first_b", "first_a"])
    def gemm_sums_kernel(
        d_x, d_w, d_s, d_b, d_f, d_y, d_dy, d_of_b, d_in, d_of_a, p_low, p_scale, p_ready, p_db, p_stats_b, p_da, p_stats_a, p_table,
        M, helpers, units, runs_b, runs_a, first_b: gl.int64, first_a: gl.int64,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, LR: gl.constexpr, SUM: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr,
        S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, SUMS: gl.constexpr,
        RANK: gl.constexpr, C_A: gl.constexpr, GROUPS_A: gl.constexpr, PER_A: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr,
        BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """As ``gemm_beside_kernel`` with dY, W, dS, A, B and dX for x, w, s, b, f and y; p_ready: ROWS words for rows of tiles, and those of
        sums_beside.py behind them.

        d_dy, d_of_b: dY and S in blocks [64, FEATURES] and [64, C]; p_db int64 [K, RANK] += dY^T S. With SUMS = 2 also d_in, d_of_a: x and dS
        in blocks [64, FEATURES] and [64, C_A]; p_da int64 [projections * RANK, N] += dS^T x. The rest as of ``token_sum_kernel``."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BK, BN], d_w.layout)
        # the same memory for programs of dS and for sums: a ring of more places
        DEEP: gl.constexpr = STAGES * BN // BM
        s_rows = reinterpret(s_w, d_x.dtype, [DEEP * 2, BM // 2, BK], d_x.layout)
        s_f = reinterpret(s_x, d_f.dtype, [STAGES * BM // C, BK, C], d_f.layout)
        s_wide = reinterpret(s_w, d_dy.dtype, [DEEP, BK, BM], d_dy.layout)
        s_of_b = reinterpret(s_x, d_of_b.dtype, [STAGES * BM // C, BK, C], d_of_b.layout)
        s_of_a = reinterpret(s_x, d_of_a.dtype, [STAGES * BM // C_A, BK, C_A], d_of_a.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        s_piece = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full, empty = ring(DEEP, 1), ring(DEEP, 2)
        full_sums, empty_sums, told, heard, idle = ring(STAGES, 1), ring(STAGES, 2), ring(2, 1), ring(2, 2), ring(1, 2)
        num_m = (M + BM - 1) // BM
        p_words = p_ready + ROWS
        # Registers: the warp that loads also looks up pieces, which it does not in 24.
        gl.warp_specialize(
            [
                (multiply_all, (
                    0, d_y, p_low, p_scale, p_ready, p_words, p_db, p_stats_b, p_da, p_stats_a, p_table,
                    s_x, s_w, s_rows, s_f, s_y, s_wide, s_of_b, s_of_a, s_piece, full, empty, idle, told, heard, full_sums, empty_sums,
                    num_m, helpers, M, units, runs_b, first_b, first_a,
                    N, K, R, LR, SUM, S0, S1, S2, F0, F1, F2, GROUPS, C, SUMS, RANK, C_A, GROUPS_A, PER_A, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
                (multiply_all, (
                    1, d_y, p_low, p_scale, p_ready, p_words, p_db, p_stats_b, p_da, p_stats_a, p_table,
                    s_x, s_w, s_rows, s_f, s_y, s_wide, s_of_b, s_of_a, s_piece, full, empty, idle, told, heard, full_sums, empty_sums,
                    num_m, helpers, M, units, runs_b, first_b, first_a,
                    N, K, R, LR, SUM, S0, S1, S2, F0, F1, F2, GROUPS, C, SUMS, RANK, C_A, GROUPS_A, PER_A, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
                (load_all, (
                    d_x, d_w, d_s, d_b, d_f, d_dy, d_of_b, d_in, d_of_a, p_ready, p_words, p_table,
                    s_x, s_w, s_rows, s_f, s_wide, s_of_b, s_of_a, s_piece,
                    full, empty, idle, told, heard, full_sums, empty_sums, num_m, helpers, M, units, runs_b, runs_a,
                    N, K, R, S0, S1, S2, F0, F1, F2, GROUPS, C, SUMS, C_A, GROUPS_A, BM, BN, BK, STAGES, DEEP, GROUP,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip


class Plan(NamedTuple):
    """What a product's shape and its chunks decide: the launch, how many of its programs make dS, and the pieces of the sums."""

    launch: launch.Launch
    helpers: int
    pieces: sums_beside.Pieces


@functools.lru_cache(maxsize=1024)  # rows and chunks differ from step to step
def plan(rows, inner, outer, layout, chunks, with_a, dtype, device) -> Plan | None:
    """None: the sums have launches of their own."""
    beside = gemm_beside.plan(rows, inner, outer, layout, False, False, dtype, device)
    if beside is None:
        return None
    product, low = beside.launch, beside.low
    pieces = sums_beside.pieces_of(layout, outer, low, chunks, launch.cdiv(rows, UNIT), product.grid[0], with_a=with_a)
    if pieces is None:
        return None
    more = (
        launch.describer(dtype, inner, UNIT, FEATURES, describe), launch.describer(dtype, layout.columns, UNIT, low.columns, describe),
        launch.describer(dtype, outer if with_a else inner, UNIT, FEATURES, describe),
        launch.describer(dtype, layout.columns, UNIT, pieces.columns, describe),
    )  # fmt: skip
    kept = {name: value for name, value in product.constants.items() if name in gemm_sums_kernel.arg_names}
    made = launch.Launch(
        gemm_sums_kernel, product.grid[:1], product.tile, (*product.describe, *more), **kept, SUMS=1 + with_a, RANK=layout.rank,
        C_A=pieces.columns, GROUPS_A=pieces.groups, PER_A=pieces.per, ROWS=project_beside.MOST_ROWS,
    )  # fmt: skip
    return Plan(made, beside.helpers, pieces)


def run(dy, weight, b, a, layout, sums: Sums):
    """(dx [M, K], ds [M, layout.columns]), the sums of ``sums`` having been added; None where several kernels have to.

    Args:
        dy: [M, N]; weight: [N, K]; b: [N, columns]; a: [columns, K], as of :func:`fastlora.kernels.gemm_beside.run`.
    """
    rows, inner = dy.shape
    outer = weight.shape[1]
    if rows * weight.numel() < project_beside.LEAST or not compiles(NAME):
        return None
    with_a = sums.x is not None
    made = plan(rows, inner, outer, layout, sums.chunks.count, with_a, dy.dtype, dy.device)
    ready = None if made is None else project_beside.words(dy.device)
    if ready is None:
        return None
    dx, ds = launch.empty(dy, rows, outer), launch.empty(dy, rows, layout.columns)
    of_b, chunks = sums.of_b, sums.chunks
    x, of_a = (sums.x, sums.of_a) if with_a else (dy, of_b)
    sinks = (of_b, of_a)[: 1 + with_a]
    first = [sink.count(chunks.count) for sink in sinks]
    done = attempt(
        NAME, made.launch, dy, weight, ds, a, b, dx, dy, sums.s, x, ds if with_a else sums.s, ds, layout.scale_of_columns(dy.device), ready,
        of_b.total, of_b.stats, of_a.total, of_a.stats, chunks.table, rows, made.helpers, chunks.units, made.pieces.runs_b,
        made.pieces.runs_a, first[0], first[-1],
    )  # fmt: skip
    if done:
        return dx, ds
    for sink in sinks:  # nothing was added
        sink.count(-chunks.count)
    return None
