"""Device functions that several kernels share: tile order, fixed-point rounding, the dropout mask.

Bits: each function computes an element from that element alone (and constants), so no result depends on the
tile's place, on the token count or on the grid.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP: tl.constexpr):
    """Row and column of the ``tile``-th output tile, walking GROUP rows at a time (keeps the weight in L2)."""
    in_group = GROUP * num_n
    first = (tile // in_group) * GROUP
    size = min(num_m - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


@triton.jit
def to_fixed(value):
    """fp32 -> int64 in units of 2^-40, rounded to nearest even.

    Multiplying by 2^40 is exact. Below 2^23 a fp32 number may have a fraction: adding and taking away 2^23 of the
    same sign leaves the nearest integer, ties to even (the classic shift-rounding). At or above 2^23 it has none,
    and the conversion is exact.
    """
    scaled = value * 1099511627776.0
    shift = tl.where(scaled >= 0, 8388608.0, -8388608.0)
    rounded = tl.where(tl.abs(scaled) < 8388608.0, (scaled + shift) - shift, scaled)
    return rounded.to(tl.int64)


@triton.jit
def philox(c0, c1, c2, seed):
    """Philox4x32-7 of counter (c0, c1, c2, 0), uint32 tensors that broadcast against each other, with a 64-bit key: four words.

    A product and its high half come from one 64-bit multiplication (tl.philox takes two). What a round makes of the token or of the
    feature alone keeps that narrow shape, and rounds one and two multiply mostly such.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), whose least number of rounds that passes BigCrush is 7.
    """
    key = seed.to(tl.uint64)  # the interpreter holds a number by its size, whatever its type says
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = c0 ^ c0
    for _ in tl.static_range(7):
        b_first = c0.to(tl.uint64) * 0xD2511F53
        b_second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b_second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (b_first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b_second.to(tl.uint32)
        c3 = b_first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_words(b_token, i_feature, seed, BF: tl.constexpr):
    """The four words, each uint32 [BM, BF / 8], of every token and group of eight features: counter (token key, feature // 8).

    b_token int64 [BM]; features i_feature .. i_feature + BF - 1, i_feature a multiple of 8. Feature f has a half of word (f % 8) // 2:
    the low one if f is even. The rule is the one of ops/dropout.py, bit for bit.
    """
    b_low = (b_token & 0xFFFFFFFF).to(tl.uint32)[:, None]
    b_high = ((b_token >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    b_group = (i_feature // 8 + tl.arange(0, BF // 8)).to(tl.uint32)[None, :]
    return philox(b_low, b_high, b_group, seed)


@triton.jit
def keep_mask(b_token, i_feature, seed, threshold, BM: tl.constexpr, BF: tl.constexpr):
    """Which of [BM, BF] loaded elements dropout keeps; arguments as in :func:`dropout_words`.

    ``threshold`` = round(p * 2^16) * 2^16, so that an odd feature's half is compared as the word it leads and an even one's after one
    shift. Eight features in a row lie in one thread, as in a 16-byte load of 16-bit numbers: nothing moves between threads.
    """
    b_w0, b_w1, b_w2, b_w3 = dropout_words(b_token, i_feature, seed, BF)
    # [BM, BF / 8, 2, 2] in the order word 0, 1, 2, 3 along the last two axes
    b_words = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))
    least = threshold.to(tl.uint32)
    return tl.reshape(tl.join((b_words << 16) >= least, b_words >= least), (BM, BF))


@triton.jit
def keep_mask_of_product(b_token, i_feature, seed, threshold, BM: tl.constexpr, BF: tl.constexpr):
    """:func:`keep_mask` for the result of a matrix product, of which a thread holds two columns in every eight.

    So the words have to change threads. Two of them travel as one 64-bit number and are compared on arrival: a quarter of the elements
    moves, once. Word 0 and word 2 lie on top: below lies what a multiplication leaves, and the compiler keeps it whole.
    """
    b_w0, b_w1, b_w2, b_w3 = dropout_words(b_token, i_feature, seed, BF)
    b_01 = b_w1.to(tl.uint64) | (b_w0.to(tl.uint64) << 32)
    b_23 = b_w3.to(tl.uint64) | (b_w2.to(tl.uint64) << 32)
    b_four = tl.reshape(tl.join(b_01, b_23), (BM, BF // 4))
    o_half = tl.arange(0, 4)[None, None, :]
    b_word = tl.where(o_half < 2, (b_four >> 32).to(tl.uint32)[:, :, None], b_four.to(tl.uint32)[:, :, None])
    b_halves = b_word << (16 - 16 * (o_half % 2)).to(tl.uint32)
    return tl.reshape(b_halves >= threshold.to(tl.uint32), (BM, BF))
