"""Subjects in plain torch maths, which import nothing of the library.

``python -m verify --subject verify.plain:SUBJECT``: every intermediate in the working dtype, torch's AdamW, no claim about
splits. ``verify.plain:CLAIMING_BITS`` is the same and claims equal bits, which it does not keep: ``splits`` says so.
"""

from __future__ import annotations

import dataclasses

import torch

from verify.oracle.adamw import Hyper
from verify.simple import FunctionLinear, FunctionOptimizer
from verify.subject import Subject


def lora_linear(x, weight, a, b, scale, bias, keep, p) -> torch.Tensor:
    """y = x W^T + s D(x) A^T B^T + bias, one torch operation after the other."""
    dropped = x if keep is None else torch.where(keep, x * (1 / (1 - p)), 0.0)
    return torch.nn.functional.linear(x, weight, bias) + (dropped @ a.T * scale) @ b.T


def adamw(parameters: list[torch.nn.Parameter], hyper: Hyper) -> torch.optim.Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW(
        parameters, lr=hyper.lr, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay
    )


class PlainLinear(FunctionLinear):
    """:func:`lora_linear` with autograd's backward."""

    def __init__(self, bitwise_splits: bool = False) -> None:
        super().__init__(lora_linear, dropout=True, bitwise_splits=bitwise_splits)


class TorchAdamW(FunctionOptimizer):
    """torch.optim.AdamW with torch's own clipping."""

    def __init__(self) -> None:
        super().__init__(adamw)


SUBJECT = Subject("plain torch", "cpu", PlainLinear(), TorchAdamW())
CLAIMING_BITS = dataclasses.replace(SUBJECT, name="plain torch, claiming bits", linear=PlainLinear(bitwise_splits=True))
