"""Tile tables by architecture: committed, never tuned at run time; the token count chooses nothing that a bit depends on.

What fixes an element's bits (the depth of a K step, the order of its steps) may depend on features, rank, dtype and
architecture alone. The rows for sm_90 were the fastest of a sweep on an H100 (2026-11-24, torch 2.11, Triton 3.6; M = 8192, K = 4096);
the others are chosen to launch within the architecture's shared memory and to spill nothing, which the compile gate holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Launch parameters of one kernel: block sizes (rows, columns, reduction depth), warps, pipeline stages.

    ``fusion``: whether the compiler may join a product and a sum into one rounding. ``each``: programs a multiprocessor is given, where
    work is cut into as many as the GPU takes.
    """

    bm: int
    bn: int = 0
    bk: int = 0
    warps: int = 4
    stages: int = 3
    group: int = 8
    halves: bool = False
    flatten: bool = False
    fusion: bool = True
    each: int = 2


# Shared memory one block may use, in bytes (NVIDIA CUDA C++ programming guide, table of compute capabilities; AMD CDNA3 ISA).
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_MEMORY)
# Bulk tensor copies (TMA) and the wide tile they feed. sm_120 has them too, but not the shared memory of this tile.
TMA_ARCHITECTURES = ("sm_90", "sm_100")

_GEMM = {
    "sm_80": Tile(128, 128, 32, warps=8, stages=4),
    "sm_86": Tile(128, 128, 32, warps=8, stages=3),
    "sm_89": Tile(128, 128, 32, warps=8, stages=3),
    "sm_90": Tile(128, 128, 64, warps=8, stages=3),
    "sm_100": Tile(128, 128, 64, warps=8, stages=3),
    "sm_120": Tile(128, 128, 32, warps=8, stages=3),
    "gfx942": Tile(128, 128, 32, warps=8, stages=2),
    # Small blocks: the interpreter runs a tile at a time in numpy, and small shapes should still have edges.
    "interpreter": Tile(32, 32, 32, warps=4, stages=1),
}
_GEMM_FP32 = {"interpreter": Tile(32, 32, 32, warps=4, stages=1)}
_GEMM_FP32_DEFAULT = Tile(64, 64, 32, warps=8, stages=2)
_GEMM_TMA = {
    "sm_90": Tile(128, 256, 64, warps=8, stages=3, halves=True, flatten=True),
    # The flattened loop does not compile for sm_100 (Triton 3.9: TritonGPUHoistTMEMAlloc fails).
    "sm_100": Tile(128, 256, 64, warps=8, stages=3, halves=True),
}
# One warp that loads beside the two warpgroups: those of the first one are counted here. 4.9 % faster than the tile above for 28,672
# features of 4,096, 1.0 % for 4,096 of 28,672 (H200, 8,192 tokens). Narrower ones for products of few tiles, which would leave most
# multiprocessors idle: tokens make them many, and every width has the same bits.
GEMM_SPECIALIZED = (
    Tile(128, 64, 64, warps=4, stages=8), Tile(128, 128, 64, warps=4, stages=6), Tile(128, 256, 64, warps=4, stages=4),
)  # fmt: skip
# Dropout's epilogue masks the rank-r product of each quarter of the tile; flattened, the loop gains nothing from it.
_GEMM_TMA_DROPOUT = Tile(128, 256, 64, warps=8, stages=3)
_GEMM_DROPOUT_BN = 64
# Rows that are no multiple of 16 bytes load element by element, with an address for each: a small tile, or registers spill.
_GEMM_RAGGED = Tile(64, 64, 32, warps=4, stages=2)


def gemm_specialized_tile(rows: int, outer: int, programs: int) -> Tile:
    """The narrowest tile of the warp-specialised GEMM whose tiles ``programs`` multiprocessors compute in one turn, else the widest."""
    widest = GEMM_SPECIALIZED[-1]
    fits = (t for t in GEMM_SPECIALIZED if -(-rows // t.bm) * -(-outer // t.bn) <= programs)
    return next(fits, widest)


def gemm_tile(arch: str, dtype: torch.dtype, *, dropout: bool, tma: bool, ragged: bool = False) -> Tile:
    """Tile of the portable GEMM with rank-r epilogue. ``ragged``: a row of an operand is no multiple of 16 bytes."""
    if tma:
        return _GEMM_TMA_DROPOUT if dropout else _GEMM_TMA[arch]
    if ragged and arch != "interpreter":
        return _GEMM_RAGGED
    if dtype == torch.float32:
        tile = _GEMM_FP32.get(arch, _GEMM_FP32_DEFAULT)
    else:
        tile = _GEMM[arch]
    if dropout and tile.bn > _GEMM_DROPOUT_BN:
        tile = tile._replace(bn=_GEMM_DROPOUT_BN)
    return tile


def project_tile(arch: str, dtype: torch.dtype, rank: int, *, apart: bool = False) -> Tile:
    """Tile of S = x A^T: bm rows, bk features a step. ``apart``: programs of several projections share a multiprocessor."""
    if arch == "interpreter":
        return Tile(32, bk=32, warps=4, stages=1)
    if dtype == torch.float32:
        return Tile(32, bk=32, warps=4 if rank <= 128 else 8, stages=2)
    if arch == "gfx942":
        return Tile(64, bk=64, warps=4, stages=2)
    small = SHARED_MEMORY[arch] < 128 * 1024
    if rank <= 32:
        return Tile(64, bk=128, warps=4, stages=4 if small else 6)
    if arch == "sm_90" and not apart:
        # H200, 4,096 features: rank 64 25 -> 20 us, 128 29 -> 22 us, 256 44 -> 33 us
        return Tile(64, bk=128 if rank <= 128 else 64, warps=4 if rank <= 64 else 8, stages=4)
    if rank <= 128:
        return Tile(64, bk=64, warps=4, stages=3 if small else 4)
    return Tile(64, bk=64, warps=8, stages=2 if small else 3)


# Features up to which wide blocks still make a program for every multiprocessor, by cutting the tokens.
_NARROW = 8192


def _token_sum_hopper(rank: int, with_ds: bool, narrow: bool, apart: bool) -> Tile:
    """sm_90 at 16 bits, up to rank 128: the fastest of a sweep on an H200 (8,192 tokens; dB with dS of gate and up at rank 16 181 -> 164
    us, dA of 4,096 features at rank 64 40 -> 28 us)."""
    if with_ds:
        # registers for one program a multiprocessor: as well use its shared memory
        return Tile(64, 512, warps=8, stages=3, each=1) if rank <= 16 and not narrow else Tile(64, 256, warps=8, stages=4, each=1)
    if rank <= 32:
        return Tile(64, 128, warps=4, stages=4, each=1) if narrow else Tile(64, 64, warps=4, stages=4)
    if rank <= 64:
        return Tile(64, 128, warps=8, stages=4, each=1) if narrow and not apart else Tile(64, 64, warps=4, stages=5 if apart else 4, each=1)
    return Tile(64, 64, warps=8, stages=3)


def token_sum_tile(arch: str, dtype: torch.dtype, rank: int, *, with_ds: bool, features: int, apart: bool = False) -> Tile:
    """Tile of the token sums: bm tokens a step (a divisor of the chunk of 64), bn features of the result.

    ``features``: of the wide operand; ``apart``: several projections walk it, each by itself.
    """
    if arch == "interpreter":
        return Tile(32, 32, warps=4, stages=1)
    if dtype == torch.float32:
        return Tile(32, 64 if rank <= 64 else 32, warps=8 if with_ds or rank > 64 else 4, stages=2)
    small = SHARED_MEMORY[arch] < 128 * 1024
    if arch == "sm_90" and rank <= 128:
        return _token_sum_hopper(rank, with_ds, features <= _NARROW, apart)
    if with_ds:
        if arch == "gfx942":
            return Tile(64, 64, warps=4, stages=2)
        if small:
            return Tile(64, 128 if rank <= 16 else 64, warps=4, stages=2)
        return Tile(64, 128, warps=4 if rank <= 16 else 8, stages=3)
    if rank <= 32:
        return Tile(64, 64, warps=8 if arch == "sm_120" else 4, stages=3 if arch == "sm_80" else 2)
    if rank <= 64:
        # 64 columns of integers: a narrower tile, or they spill
        if arch == "sm_120":
            return Tile(64, 16, warps=4, stages=2)
        return Tile(64, 64 if arch == "gfx942" else 32, warps=8, stages=2)
    if arch == "sm_120":
        return Tile(64, 16, warps=8, stages=2 if rank <= 128 else 1)
    if arch == "gfx942":
        return Tile(64 if rank <= 128 else 32, 16, warps=8, stages=1)
    # sm_90, above rank 128: Triton 3.8 spills with a second stage
    return Tile(64, 32, warps=8, stages=1 if arch == "sm_90" else 2)


def mask_tile(arch: str) -> Tile:
    """Tile of dropout's bits: bm rows, bn bytes of eight features."""
    return Tile(16, 16, warps=4, stages=1) if arch == "interpreter" else Tile(16, 64, warps=4, stages=1)


def reduce_tile(rank: int) -> Tile:
    """Tile of the reduction of dS partials: bm rows of the padded rank."""
    return Tile(max(1, 1024 // rank), warps=4, stages=2)


# Above this padded rank the partials of dS cost more traffic than a second pass over dY, so dS is a skinny product of its own.
DS_IN_TOKEN_SUM_MAX_RANK = 32

# Blocks of attention: documents start at multiples of it (fastlora.stream aligns them to it on CUDA).
ATTENTION_BLOCK = 64


# Widest head for which every kernel fits the registers; wider ones take the torch path.
ATTENTION_MAX_HEAD = {arch: 128 if arch == "gfx942" else 256 for arch in (*ARCHITECTURES, "interpreter")}


def attention_tile(arch: str, dtype: torch.dtype, head: int, *, of: str) -> Tile:
    """Tile of attention: bm queries, bn keys, of the "forward", "dq" or "dkv". A program owns a block of 64 of one (keys in dkv) and walks
    the other.

    Wide heads walk in shorter steps, or the accumulators spill. A document is a multiple of 64, so every step ends with it.
    """
    small = arch != "interpreter" and SHARED_MEMORY[arch] < 128 * 1024
    step = 64 if head <= 64 or (head <= 128 and not small) else 32
    if head > 128 and (small or arch == "sm_90" and of != "dkv"):
        step = 16
    if of == "dkv" and (arch, head) in (("sm_120", 64), ("gfx942", 128)):
        return Tile(16, ATTENTION_BLOCK, warps=4, stages=1)
    if head > 128 and arch == "sm_100" and of == "dq":
        step = 64
    if head <= 64 and arch == "gfx942" and of == "dkv":
        step = 32
    stages = 1 if dtype == torch.float32 or head > 128 or (small and head > 64) else 2
    if of == "dq" and dtype != torch.float32 and (arch in ("sm_86", "sm_89") and 64 < head <= 128 or arch == "sm_100" and head > 128):
        stages = 2  # with one, the second walk's block is held in registers beside the sum, and they spill
    if arch == "sm_90" and dtype != torch.float32:
        # wide heads: with one stage the compiler holds a whole step in registers and spills
        stages = 3 if of == "forward" and head <= 128 else 1 if of == "forward" else 2
    narrow = head <= 128 and (of != "dkv" or arch == "sm_90")
    warps = 4 if head <= 64 and arch != "sm_120" or narrow else 8
    rows, columns = (step, ATTENTION_BLOCK) if of == "dkv" else (ATTENTION_BLOCK, step)
    return Tile(rows, columns, warps=warps, stages=stages)


# A block of 64 queries and one of 64 keys for each of two warpgroups; those of the first one are counted here.
_ATTENTION_SPECIALIZED = Tile(ATTENTION_BLOCK, ATTENTION_BLOCK, warps=4, stages=3)


def attention_specialized_tile() -> Tile:
    """Tile of the warp-specialised kernels of attention, all three."""
    return _ATTENTION_SPECIALIZED


# Elements of one program of the optimiser; each of its float64 operations is rounded by itself, as torch rounds them.
ADAMW_TILE = Tile(2048, warps=8, stages=1, fusion=False)

# Elements of one program that copies A and B.
FACTORS_TILE = Tile(1024, warps=4, stages=1)
