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
def keep_mask(b_token, i_feature, seed, threshold, BM: tl.constexpr, BF: tl.constexpr):
    """Which of [BM, BF] elements dropout keeps: Philox4x32-10, counter (token key, feature // 4), word feature % 4.

    b_token int64 [BM]; features i_feature .. i_feature + BF - 1 (i_feature a multiple of 4); keep iff the word is at least
    ``threshold`` = floor(p * 2^32), compared unsigned. The rule is the one of ops/dropout.py, bit for bit.
    """
    b_zero = tl.zeros((BM, BF // 4), dtype=tl.int32)
    b_low = (b_token & 0xFFFFFFFF).to(tl.int32)[:, None] + b_zero
    b_high = ((b_token >> 32) & 0xFFFFFFFF).to(tl.int32)[:, None] + b_zero
    b_quad = (i_feature // 4 + tl.arange(0, BF // 4))[None, :] + b_zero
    b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, b_low, b_high, b_quad, b_zero)
    # [BM, BF/4, 2, 2] in the order word 0, 1, 2, 3 along the last two axes
    b_words = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))
    b_words = tl.reshape(b_words, (BM, BF))
    return b_words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)
