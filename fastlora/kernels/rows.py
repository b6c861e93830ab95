"""What the row-wise kernels share: RMSNorm's styles, and tensors made ready for a launch.

Bits: a row's result depends on that row and on constants alone. Where a program handles several rows, each is reduced along its
own axis in the order that the columns' place fixes, never across rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.errors import InputError

ALIGN_BYTES = 16


@triton.jit
def norm_factor(b_w, STYLE: tl.constexpr):
    """The factor of a normalised row in fp32: w, or 1 + w where the style is "offset"."""
    b_w = b_w.to(tl.float32)
    if STYLE == "offset":
        b_w = 1.0 + b_w
    return b_w


@triton.jit
def norm_scaled(b_n, b_w, STYLE: tl.constexpr, DTYPE: tl.constexpr):
    """Normalised fp32 values times the fp32 factor, rounded to DTYPE where ops/rms_norm.py rounds."""
    if STYLE == "round_first":
        b_n = b_n.to(DTYPE).to(tl.float32)
    return (b_n * b_w).to(DTYPE)


def ready(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` if it is contiguous and begins at a 16-byte line (as every compiled kernel assumes), else a copy that does."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGN_BYTES else tensor


def rows_ready(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` [M, K] if its rows are contiguous and apart, as columns of a wider buffer are, and begin at a 16-byte line; else a copy
    that is :func:`ready`."""
    apart = tensor.stride(1) == 1 and (tensor.shape[0] < 2 or tensor.stride(0) >= tensor.shape[1])
    return tensor if apart and not tensor.data_ptr() % ALIGN_BYTES else ready(tensor)


def check_rows(name: str, tensor: torch.Tensor, columns: int) -> None:
    """Refuse what a kernel cannot read or write in place: rows of at least ``columns``, contiguous, from a 16-byte line.

    Raises:
        InputError: names the tensor and what is wrong.
    """
    if tensor.dim() != 2 or tensor.shape[1] < columns:
        raise InputError(f"{name}: shape is {tuple(tensor.shape)}; needs [M, {columns} or more]")
    if tensor.stride(1) != 1 or (tensor.shape[0] > 1 and tensor.stride(0) < columns):
        raise InputError(f"{name}: strides are {tensor.stride()}; needs rows apart and a contiguous last axis")
    if tensor.data_ptr() % ALIGN_BYTES:
        raise InputError(f"{name}: begins {tensor.data_ptr() % ALIGN_BYTES} bytes past a 16-byte line; slices must begin at one")


def row_stride(tensor: torch.Tensor) -> int:
    """Elements from a row to the next; for a single row its length, so that no binary depends on the number of rows."""
    return tensor.stride(0) if tensor.shape[0] > 1 else max(tensor.stride(0), tensor.shape[1])
