"""The LoRA linear and its hand-derived gradients in float64.

With D the dropout given as a mask, s the scale, and L any scalar of y with dy = dL/dy::

    S  = s D(x) A^T        y  = x W^T + S B^T + bias
    dS = s dy B            dx = dy W + D'(dS A)
    dB = dy^T S            dA = dS^T D(x)

(Hu et al., "LoRA", 2021, with the scale alpha/r; Kalajdzievski, "rsLoRA", 2023, with
alpha/sqrt(r).)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from verify.oracle.philox import rate


@dataclass(frozen=True)
class LinearGradients:
    """Gradients in float64: ``dx`` [M, K], ``da`` [r, K], ``db`` [N, r]."""

    dx: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def drop(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """D(x) = x keep / (1 - rate(p)) in float64; ``keep`` is bool of x's shape, None for no dropout."""
    x = x.double()
    return x if keep is None else torch.where(keep, x / (1.0 - rate(p)), torch.zeros_like(x))


def lora_linear_forward(x, weight, a, b, scale, bias=None, *, keep=None, p=0.0) -> torch.Tensor:
    """y [M, N] float64 from x [M, K], weight [N, K], a [r, K], b [N, r] of any floating dtype."""
    s = scale * (drop(x, keep, p) @ a.double().T)
    y = x.double() @ weight.double().T + s @ b.double().T
    return y if bias is None else y + bias.double()


def lora_linear_backward(dy, x, weight, a, b, scale, *, keep=None, p=0.0) -> LinearGradients:
    """The three gradients for dy [M, N]; arguments as in :func:`lora_linear_forward`."""
    dy, dropped = dy.double(), drop(x, keep, p)
    s = scale * (dropped @ a.double().T)
    ds = scale * (dy @ b.double())
    dx = dy @ weight.double() + drop(ds @ a.double(), keep, p)
    return LinearGradients(dx=dx, da=ds.T @ dropped, db=dy.T @ s)
