"""Which path computes an operation: Triton kernels, the torch reference, and why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch

_forced: list[str] = []
BACKENDS = ("triton", "reference")


def triton_installed() -> bool:
    """Whether the triton package is there (it has no wheel for macOS and Windows)."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend inside the block: "triton" (on CPU: the interpreter, if it was on when Triton was imported) or
    "reference". For tests, verification and debugging.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def explain(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason) for tensors of this device and dtype. Nothing is compiled by asking."""
    if _forced:
        return _forced[-1], "forced"
    if device.type != "cuda":
        return "reference", f"device is {device.type}"
    return _explain_cuda(device.index if device.index is not None else torch.cuda.current_device(), dtype)


@functools.cache
def _explain_cuda(index: int, dtype: torch.dtype) -> tuple[str, str]:
    """:func:`explain` for a GPU: asked at every call of an operation, and answered by the driver."""
    if not triton_installed():
        return "reference", "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "reference", f"dtype {dtype} has no kernel"
    from fastlora.kernels import launch

    arch = launch.architecture(index)
    if arch is None:
        return "reference", "no tile table for this GPU (compute capability below 8.0)"
    if dtype == torch.bfloat16 and torch.version.hip is None and not torch.cuda.is_bf16_supported():
        return "reference", "this GPU has no bf16"
    return "triton", arch


def pick(tensor: torch.Tensor) -> str:
    """The backend for this tensor."""
    if _forced:
        return _forced[-1]
    if not tensor.is_cuda:
        return "reference"
    return _explain_cuda(tensor.get_device(), tensor.dtype)[0]
