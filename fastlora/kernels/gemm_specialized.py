"""The GEMM for Hopper (compute capability 9.0): one warp loads, two warpgroups multiply.

The product, tile and order of sums are those of ``gemm.gemm_tma_kernel``, so are the bits; what differs is who waits for whom. There,
all warps of a program leave a finished tile together, and the tensor cores rest meanwhile. Here a warp of its own fills a ring of
STAGES blocks by bulk copies (TMA) and never stops between tiles, and each warpgroup multiplies, rounds and stores its 64 rows by itself.
The rank-r product is one more block of the ring. Source: the warp-specialised persistent kernels of CUTLASS 3 (NVIDIA), here in Gluon
(see hopper.py).
"""

from __future__ import annotations

import functools

from fastlora.kernels import hopper, launch
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    describe,
    gl,
    gluon,
    tma,
)

NAME = "GEMM"
# Parts in which a warpgroup stores its columns: two buffers of a quarter are all the shared memory that four stages leave.
PARTS = 4
# Columns of the widest tile: a projection that begins at a multiple of it shares no tile of any width with another.
WIDEST = 256
# The kernel's tensors; all but the bias are described.
OPERANDS = ("d_x", "d_w", "d_s", "d_b", "p_bias", "d_y")


if MISSING is None:
    from fastlora.kernels.gemm_blocks import load_block, load_blocks, multiply_tile, quarters, tile_at
    from fastlora.kernels.project_beside import await_low
    from fastlora.kernels.ring import leave, ring

    @gluon.jit
    def first_column(n0, R: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr):
        """First rank column of the projection to which the output features from n0 on belong; 0 where all tiles take all columns."""
        first = n0 * 0
        if SECOND > 0:
            first += (n0 >= SECOND).to(gl.int32) * R
        if THIRD > 0:
            first += (n0 >= THIRD).to(gl.int32) * R
        return first

    @gluon.jit
    def load_tiles(
        d_x, d_w, d_s, d_b, p_ready, s_x, s_w, full, empty, num_m, helpers,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, BESIDE: gl.constexpr,
    ):  # fmt: skip
        """The loading warp: every block of every tile of this program, in order. BESIDE: the first ``helpers`` programs have no tile, and
        make s (project_beside.py)."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        turn = 0
        for tile in range(gl.program_id(0) - helpers, num_m * num_n, gl.num_programs(0) - helpers):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            turn = load_blocks(d_x, d_w, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, 0, K, BM, BN, BK, STAGES, TRANSPOSED)
            if BESIDE:
                await_low(p_ready, i_m, num_n)
            r0 = first_column(i_n * BN, R, SECOND, THIRD)
            for i_r in gl.static_range(0, R, BK):
                load_block(d_s, d_b, s_x, s_w, full, empty, turn, i_m * BM, i_n * BN, r0 + i_r, BM, BN, BK, STAGES, TRANSPOSED)
                turn += 1

    @gluon.jit
    def multiply_tiles(
        HALF: gl.constexpr, p_bias, d_y, s_x, s_w, s_y, full, empty, num_m, helpers,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
        STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup: the upper (HALF = 0) or lower rows of every tile of this program."""
        num_n: gl.constexpr = (N + BN - 1) // BN
        turn = 0
        for tile in range(gl.program_id(0) - helpers, num_m * num_n, gl.num_programs(0) - helpers):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0 = i_m * BM + HALF * (BM // 2)
            n0 = i_n * BN
            b_acc, turn = multiply_tile(s_x, s_w, full, empty, turn, HALF, K, R, BM, BN, BK, STAGES, TRANSPOSED)
            if BIAS:
                o_n = n0 + gl.arange(0, BN, gl.SliceLayout(0, b_acc.type.layout))
                b_acc += gl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)[None, :]
            b_parts = quarters(b_acc, BM // 2, BN)
            for i_quarter in gl.static_range(4):
                leave(b_parts[i_quarter], d_y, s_y.index(HALF * 2 + i_quarter % 2), m0, n0 + i_quarter * (BN // 4), 1)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["M"])
    def gemm_specialized_kernel(
        d_x, d_w, d_s, d_b, p_bias, d_y, M,
        N: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SECOND: gl.constexpr, THIRD: gl.constexpr, TRANSPOSED: gl.constexpr,
        BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K]; d_w [N, K] if TRANSPOSED else [K, N]; d_s [M, LR]; d_b [N, LR] or [LR, N] alike; d_y [M, N]: descriptors, of half a
        tile's rows of x, s and y. Edges load zeros, and stores clip.

        A tile takes R rank columns: the first ones, or with SECOND and THIRD (the first output features of the second and the third
        projection) those of its own projection, the rest of b's rows being zeros."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BN, BK] if TRANSPOSED else [STAGES, BK, BN], d_w.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        full, empty = ring(STAGES, 1), ring(STAGES, 2)  # emptied by one arrival a warpgroup
        num_m = (M + BM - 1) // BM
        # Registers: 240 a thread for the two that multiply (128 of them the sum), 24 for the one that loads.
        gl.warp_specialize(
            [
                (multiply_tiles, (
                    0, p_bias, d_y, s_x, s_w, s_y, full, empty, num_m, 0,
                    N, K, R, BIAS, BM, BN, BK, STAGES, TRANSPOSED, GROUP,
                )),
                (multiply_tiles, (
                    1, p_bias, d_y, s_x, s_w, s_y, full, empty, num_m, 0,
                    N, K, R, BIAS, BM, BN, BK, STAGES, TRANSPOSED, GROUP,
                )),
                (load_tiles, (
                    d_x, d_w, d_s, d_b, p_bias, s_x, s_w, full, empty, num_m, 0,
                    N, K, R, SECOND, THIRD, BM, BN, BK, STAGES, TRANSPOSED, GROUP, False,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def blocks_of(tile, *, transposed: bool) -> dict[str, tuple[int, int]]:
    """The block [rows, columns] of each descriptor of the kernel."""
    x, w = (tile.bm // 2, tile.bk), (tile.bn, tile.bk) if transposed else (tile.bk, tile.bn)
    return {"d_x": x, "d_w": w, "d_s": x, "d_b": w, "d_y": (tile.bm // 2, tile.bn // PARTS)}


def rank_columns(layout, stored: int, tile, *, transposed: bool) -> tuple[int, int, int]:
    """(columns that a tile takes, first output feature of the second projection, of the third): R, SECOND and THIRD of the kernel.

    Forward, where every projection begins with a tile, a tile takes those of its own projection. Otherwise all, without whole blocks of
    padding.
    """
    if layout is None:
        return stored, 0, 0
    if transposed and layout.count > 1 and not any(start % WIDEST for start in layout.starts):
        return layout.padded, *(*layout.starts[1:], 0)[:2]
    return min(stored, launch.cdiv(layout.count * layout.padded, tile.bk) * tile.bk), 0, 0


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, inner, outer, stored, layout, transposed, biased, dtype, device) -> launch.Launch | None:
    """What a product's shape decides, or None where another kernel computes it; ``stored``: the columns of s, 0 without it."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, inner, outer)):
        return None
    tile = launch.gemm_specialized_tile(rows, outer, launch.persistent_programs(device))
    rank, second, third = rank_columns(layout, stored, tile, transposed=transposed) if stored else (0, 0, 0)
    wide = {"d_x": inner, "d_w": inner if transposed else outer, "d_s": stored or inner, "d_y": outer}
    wide["d_b"] = (stored if transposed else outer) if stored else wide["d_w"]
    made = {name: launch.describer(dtype, wide[name], *block, describe) for name, block in blocks_of(tile, transposed=transposed).items()}
    tiles = launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
    return launch.Launch(
        gemm_specialized_kernel, (launch.even_programs(tiles, device),), tile, tuple(made.get(name) for name in OPERANDS),
        N=outer, K=inner, R=rank, SECOND=second, THIRD=third, TRANSPOSED=transposed, BIAS=biased,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip


def run(x, weight, s, b, bias, out, *, transposed: bool, layout=None) -> bool:
    """out [M, N] = x W' + s b' + bias, arguments as of :func:`fastlora.kernels.gemm.gemm`; False: another kernel has to."""
    if not hopper.compiles(NAME):
        return False
    rows, inner = x.shape
    stored = 0 if s is None else s.shape[1]
    made = plan(rows, inner, out.shape[1], stored, layout, transposed, bias is not None, x.dtype, x.device)
    if made is None:
        return False
    return attempt(NAME, made, x, weight, x if s is None else s, weight if b is None else b, x if bias is None else bias, out, rows)
