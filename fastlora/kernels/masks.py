"""Dropout's masks as bits: what several kernels of one backward read instead of drawing random words again.

A product that draws them itself keeps the tensor cores waiting (H200: 250 of 1,770 us). Here a pass of its own draws each once.

Of a token and 64 features there are two words, int32: of features whose place in their eight is below 4, and of the others. Feature f is bit
(f % 64) // 8 + 8 * (f % 4 // 2) + 16 * (f % 2) of word (f % 8) // 4: features of one random word lie as one thread of a product holds them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tables import mask_tile
from fastlora.kernels.tile import dropout_words

# Features of two words, and words.
BLOCK, WORDS = 64, 2


@triton.jit(do_not_specialize=["M", "seed0", "seed1", "seed2", "threshold"])
def mask_kernel(
    p_token, p_bits, M, seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, threshold: tl.int64,
    BLOCKS: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """p_token int64 [M]; p_bits int32 [projections, M, BLOCKS, 2]. A program draws BM rows of BB blocks of one projection."""
    i_p = tl.program_id(1)
    seed = tl.where(i_p == 0, seed0, tl.where(i_p == 1, seed1, seed2))
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_block = tl.program_id(2) * BB
    b_token = tl.load(p_token + o_m, mask=o_m < M, other=0)
    b_0, b_1, b_2, b_3 = dropout_words(b_token, i_block * 64, seed, BB * 64)
    least = threshold.to(tl.uint32)
    place = (tl.arange(0, BB * 8) % 8)[None, :]
    o_b = i_block + tl.arange(0, BB)
    p_row = p_bits + ((i_p * M.to(tl.int64) + o_m)[:, None] * BLOCKS + o_b[None, :]) * 2
    m_b = (o_m < M)[:, None] & (o_b < BLOCKS)[None, :]
    tl.store(p_row, tl.sum(tl.reshape(two_words(b_0, b_1, least) << place, (BM, BB, 8)), 2), mask=m_b)
    tl.store(p_row + 1, tl.sum(tl.reshape(two_words(b_2, b_3, least) << place, (BM, BB, 8)), 2), mask=m_b)


@triton.jit
def two_words(b_first, b_second, least):
    """int32: which halves of two random words keep: the low ones at bits 0 and 8, the high ones at 16 and 24."""
    b_low = ((b_first << 16) >= least).to(tl.int32) | (((b_second << 16) >= least).to(tl.int32) << 8)
    return b_low | ((b_first >= least).to(tl.int32) << 16) | ((b_second >= least).to(tl.int32) << 24)


@triton.jit
def keep_mask_of_bits(p_bits, o_m, m_m, i_feature, BLOCKS: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """Which of [BM, BF] elements are kept, of bits of one projection; i_feature, a multiple of 8: the first feature. As in
    ``tile.keep_mask`` eight features in a row lie in one thread."""
    o_group = i_feature // 8 + tl.arange(0, BF // 8)
    p_pair = p_bits + (o_m.to(tl.int64)[:, None] * BLOCKS + (o_group // 8)[None, :]) * 2
    m_pair = m_m[:, None] & (o_group // 8 < BLOCKS)[None, :]
    b_first = tl.load(p_pair, mask=m_pair, other=0) >> (o_group % 8)[None, :]
    b_last = tl.load(p_pair + 1, mask=m_pair, other=0) >> (o_group % 8)[None, :]
    b_both = tl.join(b_first, b_last)
    # features 0 to 3 of a word lie at bits 0, 16, 8, 24
    b_word = tl.join(tl.join(b_both, b_both >> 8), tl.join(b_both >> 16, b_both >> 24))
    return (tl.reshape(b_word, (BM, BF)) & 1) != 0


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def _plan(rows: int, blocks: int, count: int, device: torch.device) -> launch.Launch:
    tile = mask_tile(launch.arch_at(device))
    grid = launch.cdiv(rows, tile.bm), count, launch.cdiv(blocks, tile.bn)
    return launch.Launch(mask_kernel, grid, tile, BLOCKS=blocks, BM=tile.bm, BB=tile.bn)


def blocks_of(features: int) -> int:
    """Blocks that ``features`` fill."""
    return launch.cdiv(features, BLOCK)


def masks(dropout: launch.Dropout, features: int) -> torch.Tensor:
    """int32 [projections, M, blocks, 2]: the masks of an input of ``features``, drawn at the first call with ``dropout``."""
    found = dropout.made.get(features)
    if found is None:
        tokens, blocks, count = dropout.tokens, blocks_of(features), len(dropout.seeds)
        found = dropout.made[features] = launch.empty(tokens, count, len(tokens), blocks, WORDS, dtype=torch.int32)
        drop = launch.dropout_arguments(dropout, tokens)
        _plan(len(tokens), blocks, count, tokens.device)(tokens, found, len(tokens), *drop.seeds, drop.threshold)
    return found
