"""Dropout's mask of a product's tile from bits (masks.py), for Hopper (compute capability 9.0).

A thread reads the bits of its elements before the tile's product and needs them after it, so nothing waits for them. In Gluon (see hopper.py).
"""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, gl, gluon

if MISSING is None:
    # Of a product [64, 64 columns]: 8 groups of 4 pairs of columns. A thread holds two rows, all groups and one pair in four.
    HELD = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0], [8, 0, 0, 0]],
            [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
            [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, 8, 4, 2],
        )
    )  # fmt: skip
    # Rows x pairs of it, and with the four quarters of a tile of 256 columns: what a thread reads.
    PAIRS = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(3, HELD.value)))
    READ = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 0, 2], [8, 0, 0]], [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [64, 4, 4]
        )
    )  # fmt: skip

    @gluon.jit
    def read_mask(p_bits, i_p, m0, n0, M, wanted, BLOCKS: gl.constexpr):
        """int32 [64, 4, 4]: the words of a warpgroup's rows, of each pair in four and each quarter of a tile's columns; zeros unless
        ``wanted``. p_bits int32 [projections, M, BLOCKS, 2]."""
        o_m = m0 + gl.expand_dims(gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, READ))), 1), 2)
        o_pair = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, READ))), 0), 2)
        o_block = n0 // 64 + gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, READ))), 0), 1)
        o_word = ((i_p * M + o_m).to(gl.int64) * BLOCKS + o_block) * 2 + o_pair // 2
        return gl.load(p_bits + o_word, mask=(o_m < M) & (o_block < BLOCKS) & wanted, other=0)

    @gluon.jit
    def words_of_quarters(b_words):
        """Four int32 [64, 4] of what :func:`read_mask` gave: of a quarter's column 2 (4 g + pair) + h, g + 16 h is the bit."""
        o_pair = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, READ))), 0), 2)
        b_even, b_odd = gl.split(gl.reshape(b_words >> (o_pair % 2 * 8), (64, 4, 2, 2)))
        b_0, b_2 = gl.split(b_even)
        b_1, b_3 = gl.split(b_odd)
        return gl.convert_layout(b_0, PAIRS), gl.convert_layout(b_1, PAIRS), gl.convert_layout(b_2, PAIRS), gl.convert_layout(b_3, PAIRS)

    @gluon.jit
    def keep_quarter(b_word):
        """Which of [64, 64] elements are kept, of a quarter's words."""
        o_group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, HELD))))
        o_half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, HELD))))
        o_group = gl.expand_dims(gl.expand_dims(gl.expand_dims(o_group, 0), 2), 3)
        o_half = gl.expand_dims(gl.expand_dims(gl.expand_dims(o_half, 0), 1), 2)
        return gl.reshape((gl.expand_dims(gl.expand_dims(b_word, 1), 3) >> (o_group + 16 * o_half)) & 1, (64, 64)) != 0
