"""MD5 over dtype, shape and raw little-endian bytes: equal digests mean equal bits and form."""

from __future__ import annotations

import hashlib

import torch


def md5_of_tensor(tensor: torch.Tensor) -> str:
    """Hex MD5 of dtype, shape and bytes of one tensor (any dtype, device, strides)."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.md5(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def md5_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """One hex MD5 for named tensors, whatever their order in the dictionary."""
    lines = [f"{name} {md5_of_tensor(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.md5("\n".join(lines).encode()).hexdigest()
