"""What the kernels for Hopper (compute capability 9.0) share: Gluon, Triton's lower level, if it is there, and what to do if it fails.

Gluon is experimental: where the installed Triton has none, or compiles a kernel no longer, :func:`usable` says so and the portable kernel
runs, with the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from triton.compiler.errors import CompilationError

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Renamed after Triton 3.8, all four.
    copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    _SHARED = gl.shared_memory_descriptor
    # (shared memory, dtype, shape, layout) -> the same memory seen so
    reinterpret = getattr(_SHARED, "reinterpret", None) or _SHARED._reinterpret
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    MISSING = None
except ImportError as error:
    gluon = gl = barrier = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = copy_in = copy_out = reinterpret = None
    MISSING = str(error)

__all__ = [
    "MISSING", "attempt", "barrier", "compiles", "copy_in", "copy_out", "describe", "fence_async_shared", "gl", "gluon", "layout_of", "mbarrier", "reinterpret",
    "serves", "tma", "usable", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

_refused: dict[str, str] = {}


def serves(arch: str) -> bool:
    """Whether these kernels are for the architecture, and Gluon is there."""
    return arch == "sm_90" and MISSING is None


def compiles(kernel: str) -> bool:
    """Whether ``kernel`` has not been found to fail with the installed Triton."""
    return kernel not in _refused


def usable(arch: str, kernel: str) -> bool:
    """Whether ``kernel`` serves the architecture and compiles."""
    return serves(arch) and compiles(kernel)


def attempt(kernel: str, launch: Callable[..., None], *arguments) -> bool:
    """``launch(*arguments)``; False, with a warning, if the installed Triton does not compile the kernel: from then on it is not
    :func:`usable`."""
    try:
        launch(*arguments)
    except (CompilationError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PassManager" not in str(error):
            raise
        told = _refused[kernel] = " ".join(str(error).split())[:300]
        warnings.warn(f"the warp-specialised {kernel} does not compile with this Triton ({told}); the portable kernel runs", stacklevel=3)
        return False
    return True


def layout_of(dtype: torch.dtype, rows: int, columns: int):
    """Swizzled shared memory for a block of [rows, columns]."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def describe(example: torch.Tensor, shape: list[int], strides: list[int], block: list[int]):
    """Gluon's tensor descriptor, for :func:`fastlora.kernels.launch.descriptor`."""
    return TensorDescriptor(example, shape, strides, block, layout_of(example.dtype, *block))
