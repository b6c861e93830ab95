"""The product with S in its own launch, for Hopper (compute capability 9.0): Y = x W^T + S B^T and S, or dX = dY W + dS A and dS.

Of three projections of a high rank the third's columns of S come from a kernel before it: there is no time for all of them.
The GEMM is that of gemm_specialized.py; its first programs make S (project_beside.py). Bits are those of the kernels apart.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastlora.kernels import gemm_specialized, hopper, launch, project_beside
from fastlora.kernels.hopper import MISSING, attempt, describe, gl, gluon, reinterpret
from fastlora.kernels.project import project_rest

NAME = "GEMM with S"
# The kernel's described tensors.
OPERANDS = ("d_x", "d_w", "d_s", "d_b", "d_f", "d_y")


if MISSING is None:
    from fastlora.kernels.gemm_specialized import load_tiles, multiply_tiles
    from fastlora.kernels.project_beside import load_low, multiply_low
    from fastlora.kernels.ring import ring

    @gluon.jit
    def load_either(
        d_x, d_w, d_s, d_b, d_f, p_ready, s_x, s_w, s_rows, s_f, full, empty, num_m, helpers,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr,
        S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, DEEP: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp of a program of S or of one with tiles."""
        if gl.program_id(0) < helpers:
            load_low(d_x, d_f, s_rows, s_f, full, empty, num_m, helpers, S0, S1, S2, F0, F1, F2, GROUPS, C, BM, BK, DEEP, TRANSPOSED)
        else:
            load_tiles(
                d_x, d_w, d_s, d_b, p_ready, s_x, s_w, full, empty, num_m, helpers,
                N, K, R, SECOND, THIRD, BM, BN, BK, STAGES, TRANSPOSED, GROUP, True,
            )

    @gluon.jit
    def multiply_either(
        HALF: gl.constexpr, p_bias, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, helpers, M,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BIAS: gl.constexpr, LR: gl.constexpr, SUM: gl.constexpr, F0: gl.constexpr,
        F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
        STAGES: gl.constexpr, DEEP: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup of a program of S or of one with tiles."""
        if gl.program_id(0) < helpers:
            multiply_low(
                HALF, p_low, p_scale, p_ready, s_rows, s_f, full, empty, num_m, helpers, M,
                LR, SUM, F0, F1, F2, GROUPS, C, BM, BK, DEEP, TRANSPOSED,
            )
        else:
            multiply_tiles(
                HALF, p_bias, d_y, s_x, s_w, s_y, full, empty, num_m, helpers,
                N, K, R, BIAS, BM, BN, BK, STAGES, TRANSPOSED, GROUP,
            )

    @gluon.jit(do_not_specialize=["M", "helpers"])
    def gemm_beside_kernel(
        d_x, d_w, d_s, d_b, d_f, d_y, p_bias, p_low, p_scale, p_ready, M, helpers,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr, TRANSPOSED: gl.constexpr,
        BIAS: gl.constexpr, LR: gl.constexpr, SUM: gl.constexpr, S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr,
        F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """As ``gemm_specialized_kernel``, and d_f: of A [LR, K] if TRANSPOSED, else of B [K, LR], blocks of C rank columns; p_low: what d_s
        describes, [M, LR]; p_scale fp32 [LR]; p_ready: int32, a word for each row of tiles. The first ``helpers`` programs make p_low."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BN, BK] if TRANSPOSED else [STAGES, BK, BN], d_w.layout)
        # the same memory for programs of S: a ring of more places where its blocks are smaller, as it waits for memory more
        DEEP: gl.constexpr = STAGES * BM // C if C > BM // 2 else STAGES * BN // BM
        s_rows = reinterpret(s_w, d_x.dtype, [DEEP * 2, BM // 2, BK], d_x.layout)
        s_f = reinterpret(s_x, d_f.dtype, [STAGES * BM // C, C, BK] if TRANSPOSED else [STAGES * BM // C, BK, C], d_f.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        full, empty = ring(DEEP, 1), ring(DEEP, 2)
        num_m = (M + BM - 1) // BM
        gl.warp_specialize(
            [
                (multiply_either, (
                    0, p_bias, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, helpers, M,
                    N, K, R, BIAS, LR, SUM, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, TRANSPOSED, GROUP,
                )),
                (multiply_either, (
                    1, p_bias, d_y, p_low, p_scale, p_ready, s_x, s_w, s_rows, s_f, s_y, full, empty, num_m, helpers, M,
                    N, K, R, BIAS, LR, SUM, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, TRANSPOSED, GROUP,
                )),
                (load_either, (
                    d_x, d_w, d_s, d_b, d_f, p_ready, s_x, s_w, s_rows, s_f, full, empty, num_m, helpers,
                    N, K, R, SECOND, THIRD, S0, S1, S2, F0, F1, F2, GROUPS, C, BM, BN, BK, STAGES, DEEP, TRANSPOSED, GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def factor_block(low, tile, *, transposed: bool) -> tuple[int, int]:
    """The block [rows, columns] of d_f."""
    return (low.columns, tile.bk) if transposed else (tile.bk, low.columns)


class Plan(NamedTuple):
    """What a product's shape decides: the launch, how many of its programs make S, and of what."""

    launch: launch.Launch
    helpers: int
    low: project_beside.Low


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, inner, outer, layout, transposed, biased, dtype, device) -> Plan | None:
    """None: S has a launch of its own."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, inner, outer)):
        return None
    tile = launch.gemm_specialized_tile(rows, outer, launch.persistent_programs(device))
    low, stored = project_beside.low_of(layout, inner, dtype, arch, transposed=transposed), layout.columns
    helpers = project_beside.helpers(low, rows, outer, tile, device, transposed=transposed)
    if not helpers:
        return None
    rank, second, third = gemm_specialized.rank_columns(layout, stored, tile, transposed=transposed)
    wide = {"d_x": inner, "d_w": inner if transposed else outer, "d_s": stored, "d_b": stored if transposed else outer, "d_y": outer}
    wide["d_f"] = inner if transposed else stored
    blocks = gemm_specialized.blocks_of(tile, transposed=transposed) | {"d_f": factor_block(low, tile, transposed=transposed)}
    described = tuple(launch.describer(dtype, wide[name], *blocks[name], describe) for name in OPERANDS)
    made = launch.Launch(
        gemm_beside_kernel, (launch.persistent_programs(device),), tile, described,
        N=outer, K=inner, R=rank, SECOND=second, THIRD=third, TRANSPOSED=transposed, BIAS=biased, LR=stored, **low.constants(),
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip
    return Plan(made, helpers, low)


def run(x, weight, factor, other, bias, *, transposed: bool, layout):
    """(out [M, N], low [M, layout.columns]), or None where two kernels have to.

    Args:
        x: [M, K]; weight: [N, K] with ``transposed``, else [K, N].
        factor, other: A [columns, K] and B [N, columns] with ``transposed``, else B [K, columns] and A [columns, N]: low is the scaled
            product of x with the first, and out has low's with the second added. bias: [N] or None. layout:
            :class:`fastlora.kernels.columns.Columns`.
    """
    rows, inner = x.shape
    outer = weight.shape[0] if transposed else weight.shape[1]
    if rows * inner * outer < project_beside.LEAST or not hopper.compiles(NAME):
        return None
    made = plan(rows, inner, outer, layout, transposed, bias is not None, x.dtype, x.device)
    ready = None if made is None else project_beside.words(x.device)
    if ready is None:
        return None
    out, low = launch.empty(x, rows, outer), launch.empty(x, rows, layout.columns)
    columns = made.low.columns * made.low.groups
    if columns < layout.columns:
        project_rest(x, factor, layout, low, columns)
    scales = layout.scale_of_columns(x.device)
    bias = x if bias is None else bias
    done = attempt(NAME, made.launch, x, weight, low, other, factor, out, bias, low, scales, ready, rows, made.helpers)
    return (out, low) if done else None
