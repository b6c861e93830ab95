"""How kernels are launched: architecture, dropout arguments, descriptors, grid sizes. Chooses nothing by the token count's bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.direct import direct
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
    "Dropout", "Launch", "arch_at", "arch_of", "can_use_tma", "cdiv", "current_stream", "describer", "descriptor", "dropout_arguments", "empty",
    "even_programs", "gemm_specialized_tile", "gemm_tile", "is_ragged", "padded_rank", "persistent_programs", "project_tile", "reduce_tile", "run",
    "token_sum_tile",
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


def arch_at(device: torch.device) -> str:
    """Key of the tile tables for a device; the CPU means Triton's interpreter."""
    return architecture(device.index) if device.type == "cuda" else "interpreter"


def arch_of(tensor: torch.Tensor) -> str:
    """:func:`arch_at` of the device a tensor lies on."""
    return arch_at(tensor.device)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def persistent_programs(device: torch.device) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    return _processors(device.index) if device.type == "cuda" else 3


def even_programs(tiles: int, device: torch.device) -> int:
    """Programs of a persistent grid that walks ``tiles`` in the fewest turns: no more than share them evenly, so that multiprocessors that
    the last turn would leave idle are free all the time."""
    turns = cdiv(tiles, persistent_programs(device))
    return cdiv(tiles, turns)


def current_stream(index: int) -> int:
    """The handle of a device's current stream."""
    return triton.runtime.driver.active.get_current_stream(index)


def padded_rank(rank: int) -> int:
    """Rank as the kernels store it: a power of two of at least 16 (the matrix instruction's depth)."""
    return max(16, 1 << (rank - 1).bit_length())


def is_ragged(dtype: torch.dtype, *features: int) -> bool:
    """Whether a row of that many features is no multiple of 16 bytes."""
    return any(f * dtype.itemsize % 16 for f in features)


# Below two steps of K the compiler unrolls the loop and stages the rank-r operands too: more shared memory than there is.
TMA_MIN_INNER = 128


def can_use_tma(arch: str, dtype: torch.dtype, inner: int, outer: int) -> bool:
    """Whether bulk tensor copies serve this product: rows of 16-byte multiples, a 16-bit dtype, K (``inner``) of two steps."""
    fits = arch in TMA_ARCHITECTURES and dtype != torch.float32 and inner >= TMA_MIN_INNER
    return fits and not is_ragged(dtype, inner, outer)


@functools.lru_cache(maxsize=256)
def describer(dtype: torch.dtype, width: int, rows: int, columns: int, make=TensorDescriptor) -> Callable[[torch.Tensor], object]:
    """A maker of descriptors of 2-D tensors of ``width`` columns for blocks of [rows, columns]; ``make`` makes one (Gluon has its own).

    Triton's own checks, which cost more than a launch, are done here once. The tensors' starts and rows, of adjacent elements, lie at
    multiples of 16 bytes.
    """
    example = make(torch.empty(1, width, dtype=dtype), [1, width], [width, 1], [rows, columns])
    kind, fields = type(example), dict(example.__dict__)

    def describe(tensor: torch.Tensor):
        made = object.__new__(kind)
        made.__dict__ = {**fields, "base": tensor, "shape": [tensor.shape[0], width], "strides": [tensor.stride(0), 1]}
        return made

    return describe


def descriptor(tensor: torch.Tensor, rows: int, columns: int, make=TensorDescriptor):
    """Descriptor of a 2-D tensor for blocks of [rows, columns]: see :func:`describer`."""
    return describer(tensor.dtype, tensor.shape[1], rows, columns, make)(tensor)


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


# torch.cuda.current_device without its look whether CUDA was started: a kept launch has been launched
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

# torch.empty_strided past the dispatcher, which costs more than the allocation: on the current device, as torch.compile's code calls it
_empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor of any values on the device of ``like``, in its dtype or in ``dtype``."""
    dtype = dtype or like.dtype
    if _empty_strided is None or not like.is_cuda or like.get_device() != _current_device():
        return like.new_empty(shape, dtype=dtype)
    strides, step = (), 1
    for size in reversed(shape):
        strides, step = (step, *strides), step * size
    return _empty_strided(shape, strides, dtype)


# (binary, constants in the kernel's order, how to start it directly or None, the kernel: while it is held here, no other one can have its id)
_binaries: dict[tuple, tuple] = {}


class Launch:
    """A kernel with all that a shape decides: grid, tile, makers of descriptors, constants. It is called with the rest: tensors, numbers.

    ``describe``: of the first arguments, tensors, how each becomes a descriptor (:func:`describer`); None: a pointer. Whoever keeps a launch
    calls it with tensors of the same dtypes on the same device each time. Everything that decides the binary is in the constants, the
    arguments' dtypes and the device: pointers are 16-byte aligned and no integer is specialised on. So the compiled kernel is looked up by
    them once and then launched directly, past the JIT's own argument inspection, which costs more than small products take. FP fusion is
    said explicitly, because its default differs between Triton releases and it changes bits.
    """

    __slots__ = ("kernel", "grid", "tile", "describe", "constants", "_index", "_compiled", "_ordered", "_direct")

    def __init__(self, kernel, grid: tuple[int, ...], tile: Tile, describe: tuple = (), **constants) -> None:
        self.kernel, self.grid, self.tile, self.constants = kernel, grid + (1,) * (3 - len(grid)), tile, constants
        self.describe = describe
        self._compiled = None

    def __call__(self, *arguments) -> None:
        """Launch on the device of the first argument, on its current stream."""
        if (self._compiled is None or _current_device() != self._index) and not self._known(arguments):
            self._by_jit(arguments)
            return
        # what compiled[grid](...) does, without the closure it makes each time
        knobs, compiled = triton.knobs.runtime, self._compiled
        enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            compiled[self.grid](*self._described(arguments), *self._ordered)
            return
        stream = current_stream(self._index)
        if self._direct is not None:
            self._direct(self.grid, stream, arguments, self.describe, self._ordered, self._refuse)
            return
        # of a tensor the launcher asks the driver whether its address is one of the device's; an address it takes as it is
        given = [self._address(a) if isinstance(a, torch.Tensor) else a for a in self._described(arguments)]
        compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *self._ordered)

    def _described(self, arguments: tuple) -> list:
        makers = (*self.describe, *(None,) * (len(arguments) - len(self.describe)))
        return [one if make is None else make(one) for one, make in zip(arguments, makers)]

    def _address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr() if tensor.is_cuda else self._refuse(tensor)

    def _refuse(self, tensor: torch.Tensor) -> int:
        where = f"an argument of shape {tuple(tensor.shape)} is on {tensor.device}"
        raise ValueError(f"{self.kernel.__name__}: {where}; allowed: the GPU of the others")

    def _known(self, arguments: tuple) -> bool:
        """Whether this device is the current one and the binary is there: it is then looked up."""
        index = _first(arguments).device.index
        known = _binaries.get(self._key(arguments))
        if known is None or _current_device() != index:
            return False
        # the binary last: another thread may look meanwhile
        self._index, self._ordered, self._direct = index, known[1], known[2]
        self._compiled = known[0]
        return True

    def _key(self, arguments: tuple) -> tuple:
        first = _first(arguments)
        dtypes = [a.dtype for a in arguments if isinstance(a, torch.Tensor)]  # parameters too
        # a kernel's own hash is computed anew at each call
        return (id(self.kernel), first.device.index, self.tile, first.dtype, *dtypes, *self.constants.values())

    def _by_jit(self, arguments: tuple) -> None:
        """Launch as Triton does, which compiles what is not compiled; the binary is kept."""
        first, given = _first(arguments), self._described(arguments)
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": self.tile.fusion}
        if not first.is_cuda:
            self.kernel[self.grid](*given, **self.constants, **options)
            return
        with torch.cuda.device(first.device):
            compiled = self.kernel[self.grid](*given, **self.constants, **options)
        ordered = tuple(self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
        _binaries[self._key(arguments)] = compiled, ordered, direct(compiled), self.kernel


def _first(arguments: tuple) -> torch.Tensor:
    """The first argument, or the tensor it describes."""
    return arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0].base


def run(kernel, grid: tuple[int, ...], tile: Tile, *arguments, **constants) -> None:
    """Launch ``kernel`` once: see :class:`Launch`."""
    Launch(kernel, grid, tile, **constants)(*arguments)
