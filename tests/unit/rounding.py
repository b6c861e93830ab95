"""Rounding bounds for tests: what fp32 arithmetic may lose, from the terms that are added."""

from __future__ import annotations

import torch

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def gamma(terms: int) -> float:
    """Higham's gamma_n for fp32: the relative loss of a sum of ``terms`` products in any order."""
    loss = terms * UNIT[torch.float32]
    return loss / (1 - loss)


def within(found: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether every element is within its own bound (float64; 2^-126 is added for underflow)."""
    return bool(((found.double() - wanted).abs() <= bound + 2.0**-126).all())
