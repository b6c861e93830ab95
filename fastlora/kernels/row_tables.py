"""Tile tables of the row-wise kernels (norms, RoPE, gates): by architecture, dtype and width alone, like tables.py.

These kernels read and write memory once and do little else, so a tile is right when every thread has two 16-byte loads of each
operand under way and enough programs fit on a multiprocessor to hide them. 16 elements a thread do that for 16-bit dtypes (fp32 has
8, the same bytes); long rows take more a thread rather than a wider program, whose barrier would wait for more warps.
"""

from __future__ import annotations

import functools

import torch

from fastlora.kernels.tables import Tile

# Threads that a program should have work for, where rows are short.
_FOUR_WARPS = 128
# Threads of the widest program; beyond it a thread takes more elements, up to _MOST_BYTES of an operand.
_WIDE_THREADS, _MOST_THREADS = 512, 1024
_MOST_BYTES = 64
# Lanes of a block that may lie idle before a narrower block is better.
_IDLE = 0.25


def _lanes(arch: str) -> int:
    return 64 if arch.startswith("gfx") else 32


def _each(dtype: torch.dtype) -> int:
    """Elements of an operand for one thread: two 16-byte loads."""
    return 32 // dtype.itemsize


def _warps(arch: str, elements: int, each: int) -> int:
    """Warps for a block of ``elements``, ``each`` a thread."""
    return max(1, min(elements // each, _WIDE_THREADS) // _lanes(arch))


def power_of_two(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, count - 1).bit_length()


def _block(count: int, most: int) -> int:
    """A power of two up to ``most`` whose blocks cover ``count`` with few lanes idle; the widest such."""
    block = min(power_of_two(count), most)
    while block > 1 and (-count % block) > _IDLE * (count + -count % block):
        block //= 2
    return block


def reads_again(dtype: torch.dtype, width: int) -> bool:
    """Whether the norm's backward reads a row twice: three operands of more than 32 KiB do not stay in registers."""
    return power_of_two(width) * dtype.itemsize > 32 * 1024


@functools.cache
def norm_tile(arch: str, dtype: torch.dtype, width: int) -> Tile:
    """Tile of RMSNorm: bm rows whole, bk their width as a power of two."""
    bk = power_of_two(max(width, 16))
    if arch == "interpreter":
        return Tile(16, bk=bk, warps=4, stages=1)
    each = _each(dtype)
    bm = max(1, each * _FOUR_WARPS // bk)
    warps = _warps(arch, bm * bk, each)
    if bk * dtype.itemsize > _MOST_BYTES * warps * _lanes(arch):
        warps = _MOST_THREADS // _lanes(arch)
    return Tile(bm, bk=bk, warps=warps, stages=1)


@functools.cache
def glu_tile(arch: str, dtype: torch.dtype, width: int) -> Tile:
    """Tile of the gates: bn columns of one row."""
    if arch == "interpreter":
        return Tile(16, 32, warps=4, stages=1)
    each = _each(dtype)
    bn = max(256, _block(width, each * _FOUR_WARPS))
    return Tile(1, bn, warps=_warps(arch, bn, each), stages=1)


@functools.cache
def head_tile(arch: str, dtype: torch.dtype, heads: int, head_dim: int) -> Tile:
    """Tile of RoPE and of the norm of heads: bm heads of one token."""
    if arch == "interpreter":
        return Tile(64, warps=4, stages=1)
    each = _each(dtype)
    width = power_of_two(head_dim)
    # a load of each half of the features a thread, in two warps (H200, 40 heads of 128: 44 us, by programs of four 53); wide heads in four
    most = each * _FOUR_WARPS // (2 if width <= 128 else 1)
    bm = _block(heads, max(1, most // width))
    return Tile(bm, warps=_warps(arch, bm * width, each), stages=1)


@functools.cache
def cross_entropy_tile(arch: str) -> Tile:
    """Tile of the loss: bn logits of one row, bk of them a lane. As many threads as a program may have: few rows are then under way, and the
    second walk finds them in the cache (H200, 128,256 logits: 361 us, by programs of 8 warps 398)."""
    return Tile(1, 256, 8, warps=4, stages=1) if arch == "interpreter" else Tile(1, 16384, 8, warps=_MOST_THREADS // _lanes(arch), stages=2)
