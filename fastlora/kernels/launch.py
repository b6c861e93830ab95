"""How kernels are launched: architecture, dropout arguments, descriptors, grid sizes. Chooses nothing by the token count's bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.tables import (
    TMA_ARCHITECTURES,
    Tile,
    gemm_specialized_tile,
    gemm_tile,
    project_tile,
    reduce_tile,
    token_sum_tile,
)

__all__ = [
    "Dropout", "arch_of", "can_use_tma", "cdiv", "descriptor", "dropout_arguments", "gemm_specialized_tile", "gemm_tile", "is_ragged",
    "padded_rank", "persistent_programs", "project_tile", "reduce_tile", "run", "token_sum_tile",
]  # fmt: skip

_BY_CAPABILITY = ((12, 0, "sm_120"), (10, 0, "sm_100"), (9, 0, "sm_90"), (8, 9, "sm_89"), (8, 6, "sm_86"), (8, 0, "sm_80"))


def cdiv(total: int, size: int) -> int:
    """How many blocks of ``size`` cover ``total`` (triton.cdiv takes microseconds on the host)."""
    return -(-total // size)


@functools.cache
def architecture(index: int) -> str | None:
    """Key of the tile tables for a CUDA or ROCm device, or None when no row fits (the reference path is used then)."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return "gfx942" if properties.gcnArchName.startswith(("gfx942", "gfx950", "gfx90a")) else None
    for major, minor, name in _BY_CAPABILITY:
        if (properties.major, properties.minor) >= (major, minor):
            return name
    return None


def arch_of(tensor: torch.Tensor) -> str:
    """Key of the tile tables for the device a tensor lies on; a CPU tensor means Triton's interpreter."""
    return architecture(tensor.device.index) if tensor.is_cuda else "interpreter"


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def persistent_programs(device: torch.device) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    return _processors(device.index) if device.type == "cuda" else 3


def padded_rank(rank: int) -> int:
    """Rank as the kernels store it: a power of two of at least 16 (the matrix instruction's depth)."""
    return max(16, 1 << (rank - 1).bit_length())


def is_ragged(dtype: torch.dtype, *features: int) -> bool:
    """Whether a row of that many features is no multiple of 16 bytes."""
    return any(f * dtype.itemsize % 16 for f in features)


# Below two steps of K the compiler unrolls the loop and stages the rank-r operands too: more shared memory than there is.
TMA_MIN_INNER = 128


@functools.cache
def can_use_tma(arch: str, dtype: torch.dtype, inner: int, outer: int) -> bool:
    """Whether bulk tensor copies serve this product: rows of 16-byte multiples, a 16-bit dtype, K (``inner``) of two steps."""
    fits = arch in TMA_ARCHITECTURES and dtype != torch.float32 and inner >= TMA_MIN_INNER
    return fits and not is_ragged(dtype, inner, outer)


@functools.lru_cache(maxsize=256)
def _checked(make, dtype: torch.dtype, width: int, rows: int, columns: int) -> tuple[type, dict]:
    """Type and fields of a descriptor that passed Triton's own checks, which cost more than a launch: once a width and block."""
    made = make(torch.empty(1, width, dtype=dtype), [1, width], [width, 1], [rows, columns])
    return type(made), dict(made.__dict__)


def descriptor(tensor: torch.Tensor, rows: int, columns: int, make=TensorDescriptor):
    """Descriptor of a 2-D tensor for blocks of [rows, columns]; ``make`` makes one (Gluon has its own). Its start and its rows, of adjacent
    elements, lie at multiples of 16 bytes."""
    height, width = tensor.shape
    kind, fields = _checked(make, tensor.dtype, width, rows, columns)
    made = object.__new__(kind)
    made.__dict__.update(fields, base=tensor, shape=[height, width], strides=[tensor.stride(0), 1])
    return made


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of the projections of one input: a 63-bit seed (run, step and module) each, one int64 key a token [M].

    ``threshold`` and ``keep_scale`` are those of :func:`fastlora.ops.dropout.threshold` and ``keep_scale``: which of 2^16 values are
    dropped, and what a kept element is multiplied by.
    """

    threshold: int
    keep_scale: float
    seeds: tuple[int, ...]
    tokens: torch.Tensor


class _DropoutArguments(NamedTuple):
    active: bool
    tokens: torch.Tensor
    seeds: tuple[int, int, int]
    threshold: int
    keep_scale: float


def dropout_arguments(dropout: Dropout | None, filler: torch.Tensor) -> _DropoutArguments:
    """Kernel arguments for a dropout, or for none (``filler`` stands in for the unused pointer)."""
    if dropout is None:
        return _DropoutArguments(False, filler, (0, 0, 0), 0, 1.0)
    seeds = (*dropout.seeds, 0, 0)[:3]
    # in the upper half of a word: see keep_mask in tile.py
    return _DropoutArguments(True, dropout.tokens, seeds, dropout.threshold << 16, dropout.keep_scale)


# (binary, constants in the kernel's order, the kernel: while it is held here, no other one can have its id)
_binaries: dict[tuple, tuple] = {}


def run(kernel, grid: tuple[int, ...], tile: Tile, *arguments, **constants) -> None:
    """Launch ``kernel`` on the device of its first argument.

    Everything that decides the binary is in the constants, the arguments' dtypes and the device: pointers are 16-byte aligned and no
    integer is specialised on. So the compiled kernel is looked up by them and launched directly, past the JIT's own argument inspection,
    which costs more than small products take. FP fusion is said explicitly, because its default differs between Triton
    releases and it changes bits.
    """
    first = arguments[0]
    tensor = first if isinstance(first, torch.Tensor) else first.base
    index = tensor.device.index
    # a kernel's own hash is computed anew at each call
    key = (id(kernel), index, tile, tensor.dtype, *[a.dtype for a in arguments if a.__class__ is torch.Tensor], *constants.values())
    known = _binaries.get(key)
    if known is not None and torch.cuda.current_device() == index:
        compiled, ordered, _ = known
        _start(compiled, grid + (1,) * (3 - len(grid)), index, arguments, ordered)
        return
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": tile.fusion}
    if not tensor.is_cuda:
        kernel[grid](*arguments, **constants, **options)
        return
    with torch.cuda.device(tensor.device):
        compiled = kernel[grid](*arguments, **constants, **options)
    _binaries[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]), kernel


def _start(compiled, grid: tuple[int, int, int], index: int, arguments: tuple, ordered: tuple) -> None:
    """Launch a compiled kernel on the current stream: what ``compiled[grid](...)`` does, without the closure it makes each time."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
        compiled[grid](*arguments, *ordered)
        return
    stream = triton.runtime.driver.active.get_current_stream(index)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *ordered)
