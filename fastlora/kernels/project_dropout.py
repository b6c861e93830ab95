"""S = scale * D(x) A^T for Hopper (compute capability 9.0): the skinny product with dropout, masked by warpgroups of their own.

A program owns 64 rows: x is read once for all projections, each of which has its own mask (masked.py). Same bits as project.py. In Gluon
(see hopper.py).
"""

from __future__ import annotations

import functools

import torch

from fastlora.kernels import hopper, launch
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    copy_in,
    describe,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from fastlora.kernels.masked import BLOCK, WAYS
from fastlora.kernels.tables import Tile

NAME = "S with dropout"
# Columns of all projections: their sums have to fit the registers of a warpgroup.
MOST_COLUMNS = 192
# Bytes of shared memory for the ring of x and A, and how many places it may have. A barrier tells one turn of its place from the next, no more:
# with these counts a place's blocks have one set of masking warpgroups each time, which wait for every turn of it.
ROOM, DEPTHS = 160 * 1024, (2 * WAYS, WAYS)

if MISSING is None:
    from fastlora.kernels.masked import EDGE, PLACES, TURNS, mask_blocks
    from fastlora.kernels.ring import ring

    @gluon.jit
    def load_x_and_a(d_x, d_a, s_x, s_a, full, row, i_block, COUNT: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr):
        """Copy a block of x, and of A of each projection, into its place of the ring."""
        stage = i_block % STAGES
        bar = full.index(stage)
        mbarrier.expect(bar, (EDGE + COUNT * R) * EDGE * 2)
        copy_in(d_x, [row, i_block * EDGE], bar, s_x.index(stage))
        for i_p in gl.static_range(COUNT):
            copy_in(d_a, [i_p * R, i_block * EDGE], bar, s_a.index(stage * COUNT + i_p))

    @gluon.jit
    def store_columns(b_sum, p_s, p_scale, row, M, first: gl.constexpr, R: gl.constexpr, LR: gl.constexpr):
        """Round a projection's scaled columns, from ``first`` on."""
        layout: gl.constexpr = b_sum.type.layout
        o_m = row + gl.arange(0, EDGE, gl.SliceLayout(1, layout))
        o_c = first + gl.arange(0, R, gl.SliceLayout(0, layout))
        b_sum *= gl.load(p_scale + o_c)[None, :]
        gl.store(p_s + o_m.to(gl.int64)[:, None] * LR + o_c[None, :], b_sum.to(p_s.dtype.element_ty), mask=(o_m < M)[:, None])

    @gluon.jit
    def multiply_masked(
        d_x, d_a, p_s, p_scale, s_x, s_masked, s_a, full, masked, read, row, M, blocks: gl.constexpr,
        COUNT: gl.constexpr, R: gl.constexpr, LR: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """The multiplying warpgroup: S of the program's rows."""
        for i in range(min(STAGES, blocks)):
            load_x_and_a(d_x, d_a, s_x, s_a, full, row, i, COUNT, R, STAGES)
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, R, 16])
        b_0 = gl.zeros((EDGE, R), gl.float32, layout)
        b_1, b_2 = b_0, b_0
        for i in range(blocks):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)  # of A; of x warpgroups that mask have waited
            for i_p in gl.static_range(COUNT):
                task = i * COUNT + i_p
                mbarrier.wait(masked.index(task % PLACES), (task // PLACES) & 1)
                b_x, b_a = s_masked.index(task % PLACES), s_a.index(stage * COUNT + i_p).permute((1, 0))
                if i_p == 0:
                    b_0 = warpgroup_mma(b_x, b_a, b_0, is_async=True)
                elif i_p == 1:
                    b_1 = warpgroup_mma(b_x, b_a, b_1, is_async=True)
                else:
                    b_2 = warpgroup_mma(b_x, b_a, b_2, is_async=True)
            if COUNT == 1:
                b_0 = warpgroup_mma_wait(0, deps=[b_0])
            elif COUNT == 2:
                b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
            else:
                b_0, b_1, b_2 = warpgroup_mma_wait(0, deps=[b_0, b_1, b_2])
            for i_p in gl.static_range(COUNT):
                mbarrier.arrive(read.index((i * COUNT + i_p) % PLACES))
            if i + STAGES < blocks:  # who masked the block has read it
                load_x_and_a(d_x, d_a, s_x, s_a, full, row, i + STAGES, COUNT, R, STAGES)
        store_columns(b_0, p_s, p_scale, row, M, 0, R, LR)
        if COUNT > 1:
            store_columns(b_1, p_s, p_scale, row, M, R, R, LR)
        if COUNT > 2:
            store_columns(b_2, p_s, p_scale, row, M, 2 * R, R, LR)
            # columns of no projection
            store_columns(gl.zeros((EDGE, R), gl.float32, layout), p_s, p_scale, row, M, 3 * R, R, LR)

    @gluon.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
    def project_dropout_kernel(
        d_x, d_a, p_s, p_scale, p_token, M, seed0: gl.int64, seed1: gl.int64, seed2: gl.int64, threshold: gl.int64, keep_scale,
        K: gl.constexpr, COUNT: gl.constexpr, R: gl.constexpr, LR: gl.constexpr, FP16: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K], d_a [LR, K]: descriptors of blocks [64, 64] and [R, 64]; p_s [M, LR]; p_scale fp32 [LR]; p_token int64 [M]; seeds,
        threshold and scale as of :class:`fastlora.kernels.launch.Dropout`."""
        gl.static_assert(TURNS == 4, "a partition below for each warpgroup that masks")
        gl.static_assert(STAGES % TURNS == 0 and PLACES % TURNS == 0, "a warpgroup waits for each turn of a place, or for none")
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES, EDGE, EDGE], d_x.layout)
        s_a = gl.allocate_shared_memory(d_a.dtype, [STAGES * COUNT, R, EDGE], d_a.layout)
        s_masked = gl.allocate_shared_memory(d_x.dtype, [PLACES, EDGE, EDGE], d_x.layout)
        pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
        s_pairs = reinterpret(s_x, gl.int32, [STAGES, EDGE, EDGE // 2], pairs)
        s_kept = reinterpret(s_masked, gl.int32, [PLACES, EDGE, EDGE // 2], pairs)
        full, masked, read = ring(STAGES, 1), ring(PLACES, 1), ring(PLACES, 1)
        row = gl.program_id(0) * EDGE
        blocks: gl.constexpr = (K + EDGE - 1) // EDGE
        gl.warp_specialize(
            [
                (multiply_masked, (
                    d_x, d_a, p_s, p_scale, s_x, s_masked, s_a, full, masked, read, row, M, blocks, COUNT, R, LR, STAGES,
                )),
                (mask_blocks, (
                    0, p_token, s_pairs, s_kept, full, masked, read, row, M, blocks, seed0, seed1, seed2, threshold, keep_scale,
                    COUNT, FP16, STAGES,
                )),
                (mask_blocks, (
                    1, p_token, s_pairs, s_kept, full, masked, read, row, M, blocks, seed0, seed1, seed2, threshold, keep_scale,
                    COUNT, FP16, STAGES,
                )),
                (mask_blocks, (
                    2, p_token, s_pairs, s_kept, full, masked, read, row, M, blocks, seed0, seed1, seed2, threshold, keep_scale,
                    COUNT, FP16, STAGES,
                )),
                (mask_blocks, (
                    3, p_token, s_pairs, s_kept, full, masked, read, row, M, blocks, seed0, seed1, seed2, threshold, keep_scale,
                    COUNT, FP16, STAGES,
                )),
            ],
            [4, 4, 4, 4],
            [88, 88, 88, 88],
        )  # fmt: skip


def constants_of(features: int, layout, dtype) -> dict[str, int]:
    """The kernel's constants."""
    count, rank = layout.count, layout.padded
    stages = next(stages for stages in DEPTHS if stages * (BLOCK + count * rank) * BLOCK * 2 <= ROOM)
    return dict(K=features, COUNT=count, R=rank, LR=layout.columns, FP16=dtype == torch.float16, STAGES=stages)


def tile_of(stages: int) -> Tile:
    """Rows and features of a step."""
    return Tile(BLOCK, bk=BLOCK, warps=4, stages=stages)


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, features, layout, dtype, device) -> launch.Launch | None:
    """None: another kernel has to."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, features, features)) or layout.count * layout.padded > MOST_COLUMNS:
        return None
    constants = constants_of(features, layout, dtype)
    described = launch.describer(dtype, features, BLOCK, BLOCK, describe), launch.describer(dtype, features, layout.padded, BLOCK, describe)
    return launch.Launch(project_dropout_kernel, (launch.cdiv(rows, BLOCK),), tile_of(constants["STAGES"]), described, **constants)


def run(x, a, layout, out, drop) -> bool:
    """out [M, columns] = scale * D(x) a^T as of :func:`fastlora.kernels.project.project`; False: another kernel has to."""
    made = plan(*x.shape, layout, x.dtype, x.device) if hopper.compiles(NAME) else None
    return made is not None and attempt(
        NAME, made, x, a, out, layout.scale_of_columns(x.device), drop.tokens, x.shape[0], *drop.seeds, drop.threshold, drop.keep_scale
    )
