"""Dropout's masks as bits, for products that apply one in their epilogue (gemm_dropout.py, gemm_glu.py).

A product that draws its random words itself keeps the tensor cores waiting, in the epilogue as between the blocks of K (H200, the backward of
a gated layer's down projection: 250 of 1,770 us); a pass before it takes a quarter of that.

Feature f is bit f % 32 of int32 word f // 32; a row's words fill whole blocks of 64 features.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tables import mask_tile
from fastlora.kernels.tile import dropout_words

# Features of a block, and their words.
BLOCK, WORDS = 64, 2


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def mask_kernel(
    p_token, p_bits, M, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64,
    BYTES: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """p_token int64 [M]; p_bits uint8 [projections, M, BYTES]. A program draws BB bytes of BM rows of one projection: eight features a byte,
    which share their random words."""
    i_p = tl.program_id(1)
    seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * BB
    b_token = tl.load(p_token + o_m, mask=o_m < M, other=0)
    b_0, b_1, b_2, b_3 = dropout_words(b_token, first * 8, seed, BB * 8)
    least = threshold.to(tl.uint32)
    b_byte = keep_bits(b_0, least, 1) + keep_bits(b_1, least, 4) + keep_bits(b_2, least, 16) + keep_bits(b_3, least, 64)
    o_byte = first + tl.arange(0, BB)
    p_byte = p_bits + (i_p * M.to(tl.int64) + o_m)[:, None] * BYTES + o_byte[None, :]
    tl.store(p_byte, b_byte.to(tl.uint8), mask=(o_m < M)[:, None] & (o_byte < BYTES)[None, :])


@triton.jit
def keep_bits(b_word, least, BIT: tl.constexpr):
    """int32: BIT and 2 BIT: whether the low and the high half of a random word keep their feature."""
    return tl.where((b_word << 16) >= least, BIT, 0) + tl.where(b_word >= least, 2 * BIT, 0)


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def _plan(rows: int, size: int, count: int, device: torch.device) -> launch.Launch:
    tile = mask_tile(launch.arch_at(device))
    grid = launch.cdiv(rows, tile.bm), count, launch.cdiv(size, tile.bn)
    return launch.Launch(mask_kernel, grid, tile, BYTES=size, BM=tile.bm, BB=tile.bn)


def masks(dropout: launch.Dropout, features: int) -> torch.Tensor:
    """int32 [projections, M, 2 ceil(features / 64)]: the masks of an input of so many features."""
    tokens, words, count = dropout.tokens, WORDS * launch.cdiv(features, BLOCK), len(dropout.seeds)
    bits = launch.empty(tokens, count, len(tokens), words, dtype=torch.int32)
    drop = launch.dropout_arguments(dropout, tokens)
    _plan(len(tokens), 4 * words, count, tokens.device)(tokens, bits.view(torch.uint8), len(tokens), *drop.seeds, drop.threshold)
    return bits
