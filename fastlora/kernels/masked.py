"""Blocks of x with dropout applied, made in shared memory for the tensor cores of Hopper (compute capability 9.0).

Where a product reads D(x), masks cost more than the product: some 75 instructions for eight elements. So warpgroups that do nothing else
(WAYS of them) take blocks in turn: each reads a block of x that was copied to one ring, and leaves it masked in the next slot of a second,
from which another warpgroup multiplies. That one also copies, so that no warp has registers and little to do. The mask is that of tile.py,
and D(x) = round(x / (1 - p)) or 0, bit for bit. In Gluon (see hopper.py).
"""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, barrier, fence_async_shared, gl, gluon, mbarrier
from fastlora.kernels.tile import philox

# Tokens and features of a block.
BLOCK = 64
# Warpgroups that mask, and places of their ring.
WAYS, SLOTS = 4, 8

if MISSING is None:
    # the same function, compiled for Gluon
    philox_here = gluon.jit(philox.fn)

    EDGE, TURNS, PLACES = gl.constexpr(BLOCK), gl.constexpr(WAYS), gl.constexpr(SLOTS)
    # Of a block: eight features in a row a thread, as groups with a random number each, or as pairs in 32 bits.
    GROUPS = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
    PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
    # $1: a pair of numbers; $2: their random word; $3: the least half of a word that keeps, in the upper half; $4: 1 / (1 - p)
    _KEEP = (
        "mul.f32 lo, lo, $4; mul.f32 hi, hi, $4; shl.b32 t, $2, 16; setp.ge.u32 p, t, $3; setp.ge.u32 q, $2, $3; "
        "selp.f32 lo, lo, 0f00000000, p; selp.f32 hi, hi, 0f00000000, q; "
    )
    _WITH = "{ .reg .b32 t; .reg .b16 l, h; .reg .f32 lo, hi; .reg .pred p, q; "
    DROP_BF16 = gl.constexpr(
        _WITH + "shl.b32 t, $1, 16; mov.b32 lo, t; and.b32 t, $1, 0xffff0000; mov.b32 hi, t; " + _KEEP + "cvt.rn.bf16x2.f32 $0, hi, lo; }"
    )
    DROP_FP16 = gl.constexpr(
        _WITH + "mov.b32 {l, h}, $1; cvt.f32.f16 lo, l; cvt.f32.f16 hi, h; " + _KEEP + "cvt.rn.f16x2.f32 $0, hi, lo; }"
    )

    @gluon.jit
    def words_of(b_token, feature, seed):
        """uint32 [64, 32]: the random word of each pair of features of a block, in the layout of its pairs."""
        o_group = gl.arange(0, EDGE // 8, gl.SliceLayout(0, GROUPS))
        b_low, b_high = (b_token & 0xFFFFFFFF).to(gl.uint32), ((b_token >> 32) & 0xFFFFFFFF).to(gl.uint32)
        b_0, b_1, b_2, b_3 = philox_here(b_low[:, None], b_high[:, None], (feature // 8 + o_group).to(gl.uint32)[None, :], seed)
        b_words = gl.join(gl.join(b_0, b_2), gl.join(b_1, b_3))
        return gl.convert_layout(gl.reshape(b_words, (EDGE, EDGE // 2)), PAIRS)

    @gluon.jit
    def mask_blocks(
        WHICH: gl.constexpr, p_token, s_pairs, s_masked, full, masked, read, row, M, blocks, seed0, seed1, seed2, threshold, keep_scale,
        COUNT: gl.constexpr, FP16: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """A masking warpgroup: every WAYS-th of COUNT masks a block of the rows from ``row`` on, block after block along the features. s_pairs,
        s_masked: the rings as int32 [64, 32] a place; full: the first one's barriers; masked, read: the second one's."""
        o_m = row + gl.arange(0, EDGE, gl.SliceLayout(1, GROUPS))
        b_token = gl.load(p_token + o_m, mask=o_m < M, other=0)
        for task in range(WHICH, blocks * COUNT, TURNS):
            i_block, i_p = task // COUNT, task % COUNT
            seed = gl.where(i_p == 0, seed0, gl.where(i_p == 1, seed1, seed2))
            b_words = words_of(b_token, i_block * EDGE, seed)
            stage, slot = i_block % STAGES, task % PLACES
            mbarrier.wait(full.index(stage), (i_block // STAGES) & 1)
            b_pairs = s_pairs.index(stage).load(PAIRS)
            b_least, b_scale = gl.full((EDGE, EDGE // 2), threshold.to(gl.uint32), gl.uint32, PAIRS), gl.full((EDGE, EDGE // 2), keep_scale, gl.float32, PAIRS)
            b_kept = gl.inline_asm_elementwise(
                DROP_FP16 if FP16 else DROP_BF16, "=r,r,r,r,f", [b_pairs, b_words, b_least, b_scale], dtype=gl.int32, is_pure=True, pack=1
            )
            mbarrier.wait(read.index(slot), ((task // PLACES) & 1) ^ 1)
            s_masked.index(slot).store(b_kept)
            fence_async_shared()
            barrier()
            mbarrier.arrive(masked.index(slot))
