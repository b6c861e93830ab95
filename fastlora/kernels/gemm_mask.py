"""Dropout's mask of a product's tile from bits (masks.py), for Hopper (compute capability 9.0).

A thread reads the bits of its elements before the tile's product and needs them after it, so nothing waits for them. In Gluon (see hopper.py).
"""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, gl, gluon

if MISSING is None:
    # Of a product [64, 64 columns]: two words of 32 columns, four groups of four pairs each. A thread holds two rows and one pair in four.
    HELD = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [8, 0, 0, 0, 0]],
            [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]],
            [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]], [], [64, 2, 4, 4, 2],
        )
    )  # fmt: skip
    # Rows x words x pairs of it, and with the four quarters of a tile of 256 columns: what a thread reads.
    PAIRS = gl.constexpr(gl.SliceLayout(2, gl.SliceLayout(4, HELD.value)))
    READ = gl.constexpr(
        gl.DistributedLinearLayout(
            [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [8, 0, 0, 0]],
            [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]], [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, 2, 4, 4],
        )
    )  # fmt: skip

    @gluon.jit
    def along(DIM: gl.constexpr, layout: gl.constexpr, SIZE: gl.constexpr):
        """0 to SIZE - 1 along one of four dimensions."""
        first: gl.constexpr = 0 if DIM > 0 else 1
        second: gl.constexpr = 1 if DIM > 1 else 2
        third: gl.constexpr = 2 if DIM > 2 else 3
        o_d = gl.arange(0, SIZE, gl.SliceLayout(first, gl.SliceLayout(second, gl.SliceLayout(third, layout))))
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(o_d, first), second), third)

    @gluon.jit
    def read_mask(p_bits, i_p, m0, n0, M, wanted, WIDTH: gl.constexpr):
        """int32 [64, 2, 4, 4]: the words of a warpgroup's rows, both of each quarter of a tile's columns, for each pair in four; zeros unless
        ``wanted``. p_bits int32 [projections, M, WIDTH]."""
        o_m = m0 + along(0, READ, 64)
        o_word = n0 // 32 + along(1, READ, 2) + along(3, READ, 4) * 2 + along(2, READ, 4) * 0
        m_word = (o_m < M) & (o_word < WIDTH) & wanted
        return gl.load(p_bits + (i_p * M + o_m).to(gl.int64) * WIDTH + o_word, mask=m_word, other=0) >> (along(2, READ, 4) * 2)

    @gluon.jit
    def words_of_quarters(b_words):
        """Four int32 [64, 2, 4] of what :func:`read_mask` gave: of column 8 g + 2 pair + h of a word, 8 g + h is the bit."""
        b_even, b_odd = gl.split(gl.reshape(b_words, (64, 2, 4, 2, 2)))
        b_0, b_2 = gl.split(b_even)
        b_1, b_3 = gl.split(b_odd)
        return gl.convert_layout(b_0, PAIRS), gl.convert_layout(b_1, PAIRS), gl.convert_layout(b_2, PAIRS), gl.convert_layout(b_3, PAIRS)

    @gluon.jit
    def keep_quarter(b_words):
        """Which of [64, 64] elements are kept, of a quarter's words."""
        o_group = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, HELD)))))
        o_half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, HELD)))))
        o_group = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(o_group, 0), 1), 3), 4)
        o_half = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(o_half, 0), 1), 2), 3)
        b_bit = gl.expand_dims(gl.expand_dims(b_words, 2), 4) >> (o_group * 8 + o_half)
        return gl.reshape(b_bit & 1, (64, 64)) != 0
