"""Dropout's mask of a tile, made while the tile's product runs, for Hopper (compute capability 9.0).

Warpgroups that multiply wait most of the time; a mask made in the epilogue would keep the tensor cores waiting instead. So between blocks of
K a thread makes a few words of the mask at a time, and keeps of each element one bit: two words a projection for a tile of 64 x 256. The
mask is that of tile.py, bit for bit. In Gluon (see hopper.py).
"""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, gl, gluon, mbarrier, warpgroup_mma_wait
from fastlora.kernels.tile import philox

if MISSING is None:
    from fastlora.kernels.gemm_blocks import add_block

    # the same function, compiled for Gluon
    philox_here = gluon.jit(philox.fn)

    # Of a product [64, 64 columns]: 8 groups of 4 pairs of columns. A thread holds two rows, all groups and one pair in four.
    HELD = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0], [8, 0, 0, 0]],
            [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
            [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, 8, 4, 2],
        )
    )  # fmt: skip
    # Rows x pairs of it: what a thread makes and keeps of the mask.
    MADE = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(3, HELD.value)))
    # Batches of four groups of columns that cover 256 of them, and the projections of which a thread can keep masks.
    BATCHES, MOST_MASKS = gl.constexpr(8), gl.constexpr(3)

    @gluon.jit
    def swap(b_left, b_right, b_upper, DISTANCE: gl.constexpr):
        """Two threads at DISTANCE, of which b_upper tells the upper: the lower one's right for the upper one's left."""
        b_given = gl.where(b_upper, b_left, b_right)
        b_taken = gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, " + DISTANCE + ", 0x1f, 0xffffffff;", "=r,r", [b_given], dtype=gl.uint32, is_pure=False, pack=1
        )
        return gl.where(b_upper, b_taken, b_left), gl.where(b_upper, b_right, b_taken)

    @gluon.jit
    def keep_batch(b_low, b_high, group, seed, threshold):
        """int32 [64, 4], eight bits: whether dropout keeps the pair of columns of each of four groups of eight, from ``group`` on.

        A thread needs of each group the word for its pair, and has all four words of one group: four threads change them, as a transposed
        matrix of 4 x 4."""
        o_group = gl.arange(0, 4, gl.SliceLayout(0, MADE))
        b_w0, b_w1, b_w2, b_w3 = philox_here(b_low[:, None], b_high[:, None], (group + o_group).to(gl.uint32)[None, :], seed)
        b_odd, b_high_pair = ((o_group & 1) > 0)[None, :], ((o_group & 2) > 0)[None, :]
        b_w0, b_w1 = swap(b_w0, b_w1, b_odd, "1")
        b_w2, b_w3 = swap(b_w2, b_w3, b_odd, "1")
        b_w0, b_w2 = swap(b_w0, b_w2, b_high_pair, "2")
        b_w1, b_w3 = swap(b_w1, b_w3, b_high_pair, "2")
        return kept(b_w0, threshold) | kept(b_w1, threshold) << 2 | kept(b_w2, threshold) << 4 | kept(b_w3, threshold) << 6

    @gluon.jit
    def kept(b_word, threshold):
        """Two bits: whether the low and the high half of a word say that the element is kept."""
        least = threshold.to(gl.uint32)
        return ((b_word << 16) >= least).to(gl.int32) | ((b_word >= least).to(gl.int32) << 1)

    @gluon.jit
    def keep_quarter(b_first, b_last, i_quarter: gl.constexpr):
        """Which of [64, 64] elements are kept, of the words for the tile's first and last 128 columns."""
        b_word = gl.expand_dims(gl.expand_dims(b_first if i_quarter < 2 else b_last, 1), 3)
        o_group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, HELD))))
        o_half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, HELD))))
        o_group = gl.expand_dims(gl.expand_dims(gl.expand_dims(o_group, 0), 2), 3)
        o_half = gl.expand_dims(gl.expand_dims(gl.expand_dims(o_half, 0), 1), 2)
        return gl.reshape((b_word >> (i_quarter % 2 * 16 + o_group * 2 + o_half)) & 1, (64, 64)) != 0

    @gluon.jit
    def multiply_tile_and_mask(
        s_x, s_w, full, empty, turn, p_token, m0, n0, M, seed0, seed1, seed2, threshold, count,
        HALF: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """(sum over K of a warpgroup's rows of a tile, the ring's turn after it, six words of masks): two words each of ``count`` projections."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
        o_m = m0 + gl.arange(0, 64, gl.SliceLayout(1, MADE))
        b_token = gl.load(p_token + o_m, mask=o_m < M, other=0)
        b_low = (b_token & 0xFFFFFFFF).to(gl.uint32)
        b_high = ((b_token >> 32) & 0xFFFFFFFF).to(gl.uint32)
        b_0 = gl.zeros((64, 4), gl.int32, MADE)
        b_1, b_2, b_3, b_4, b_5 = b_0, b_0, b_0, b_0, b_0
        each: gl.constexpr = (K // BK) // (BATCHES * MOST_MASKS)
        b_acc = gl.zeros((BM // 2, BN), gl.float32, layout)
        for i in range(BATCHES * count):
            for i_step in gl.static_range(each):
                b_acc = add_block(b_acc, s_x, s_w, full, empty, turn, i + i_step > 0, HALF, BK, BK, STAGES, False)
                turn += 1
            i_p, i_batch = i // BATCHES, i % BATCHES
            seed = gl.where(i_p == 0, seed0, gl.where(i_p == 1, seed1, seed2))
            b_bits = keep_batch(b_low, b_high, n0 // 8 + i_batch * 4, seed, threshold) << (i_batch % 4 * 8)
            word = i_p * 2 + i_batch // 4
            b_0, b_1, b_2 = b_0 | gl.where(word == 0, b_bits, 0), b_1 | gl.where(word == 1, b_bits, 0), b_2 | gl.where(word == 2, b_bits, 0)
            b_3, b_4, b_5 = b_3 | gl.where(word == 3, b_bits, 0), b_4 | gl.where(word == 4, b_bits, 0), b_5 | gl.where(word == 5, b_bits, 0)
        done = BATCHES * count * each
        for i in range(done, (K + BK - 1) // BK):
            b_acc = add_block(b_acc, s_x, s_w, full, empty, turn, i > 0, HALF, BK, BK, STAGES, False)
            turn += 1
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
        return b_acc, turn, b_0, b_1, b_2, b_3, b_4, b_5
