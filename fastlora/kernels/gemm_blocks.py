"""What the warp-specialised products share: a tile's place, blocks that the loading warp brings, sums that a warpgroup makes of them.

The ring has STAGES places for a block [BM, BK] of x, one half a warpgroup, and one of w. In Gluon (see hopper.py).
"""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, copy_in, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait

if MISSING is None:
    from fastlora.kernels.ring import claim

    @gluon.jit
    def tile_at(tile, num_m, num_n, GROUP: gl.constexpr):
        """Row and column of the ``tile``-th output tile: ``tile.grouped_tile``, which Gluon code cannot call."""
        in_group = GROUP * num_n
        first = (tile // in_group) * GROUP
        size = gl.minimum(num_m - first, GROUP)
        return first + (tile % in_group) % size, (tile % in_group) // size

    @gluon.jit
    def load_halves(d_x, s_x, bar, stage, m0, i_k, BM: gl.constexpr):
        """Copy the block of BM rows of d_x, one half a warpgroup."""
        for i_half in gl.static_range(2):
            copy_in(d_x, [m0 + i_half * (BM // 2), i_k], bar, s_x.index(stage * 2 + i_half))

    @gluon.jit
    def load_block(
        d_x, d_w, s_x, s_w, full, empty, turn, m0, n0, i_k,
        BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """Copy the blocks [BM, BK] of d_x and [BN, BK] (or [BK, BN]) of d_w into the ring's next place, once it is free."""
        stage, bar = claim(full, empty, turn, (BM + BN) * BK * 2, STAGES)
        load_halves(d_x, s_x, bar, stage, m0, i_k, BM)
        if TRANSPOSED:
            copy_in(d_w, [n0, i_k], bar, s_w.index(stage))
        else:
            copy_in(d_w, [i_k, n0], bar, s_w.index(stage))

    @gluon.jit
    def load_blocks(
        d_x, d_w, s_x, s_w, full, empty, turn, m0, n0, START: gl.constexpr, WIDTH: gl.constexpr,
        BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """Copy the blocks of WIDTH features from START on; the ring's turn after them."""
        for i_k in range(START, START + WIDTH, BK):
            load_block(d_x, d_w, s_x, s_w, full, empty, turn, m0, n0, i_k, BM, BN, BK, STAGES, TRANSPOSED)
            turn += 1
        return turn

    @gluon.jit
    def add_block(
        b_acc, s_x, s_w, full, empty, turn, before,
        HALF: gl.constexpr, DEPTH: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """b_acc plus the product of the first DEPTH columns of the ring's next blocks, left running; the block before it is then done,
        and its place free."""
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        b_x = s_x.index(stage * 2 + HALF)
        b_w = s_w.index(stage)
        if TRANSPOSED:
            b_w = b_w.permute((1, 0))
        if DEPTH < BK:
            b_x = b_x.slice(0, DEPTH, dim=1)
            b_w = b_w.slice(0, DEPTH, dim=0)
        b_acc = warpgroup_mma(b_x, b_w, b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(1, deps=[b_acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=before)
        return b_acc

    @gluon.jit
    def halves(b_acc, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
        """The left and the right half of the columns."""
        return gl.split(gl.permute(gl.reshape(b_acc, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))

    @gluon.jit
    def quarters(b_acc, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
        """The four quarters of the columns, from the left."""
        b_left, b_right = halves(b_acc, HEIGHT, WIDTH)
        b_0, b_1 = halves(b_left, HEIGHT, WIDTH // 2)
        b_2, b_3 = halves(b_right, HEIGHT, WIDTH // 2)
        return b_0, b_1, b_2, b_3

    @gluon.jit
    def multiply_tile(
        s_x, s_w, full, empty, turn,
        HALF: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
        TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """(sum over K, then over R, of a warpgroup's rows of a tile; the ring's turn after it)."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
        b_acc = gl.zeros((BM // 2, BN), gl.float32, layout)
        for i_k in range(0, K, BK):
            b_acc = add_block(b_acc, s_x, s_w, full, empty, turn, i_k > 0, HALF, BK, BK, STAGES, TRANSPOSED)
            turn += 1
        for _ in gl.static_range(0, R, BK):
            # a block may hold more than R columns: a low rank pays for its own alone
            b_acc = add_block(b_acc, s_x, s_w, full, empty, turn, True, HALF, min(R, BK), BK, STAGES, TRANSPOSED)
            turn += 1
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
        return b_acc, turn
