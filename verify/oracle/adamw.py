"""AdamW in float64 (Loshchilov, Hutter, "Decoupled weight decay regularization", 2019, alg. 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one run; ``max_grad_norm`` None for no clipping."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None


def clip_coefficient(gradients: dict[str, torch.Tensor], max_norm: float | None) -> float:
    """min(1, max_norm / norm), the 2-norm over all tensors in float64 (1 for no clipping)."""
    if max_norm is None:
        return 1.0
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return 1.0 if norm <= max_norm else max_norm / norm


@dataclass
class AdamWOracle:
    """One optimiser over named tensors; :meth:`step` returns the new float64 values.

    ``parameters`` are copied to float64. The moments start at zero.
    """

    parameters: dict[str, torch.Tensor]
    hyper: Hyper
    steps: int = 0
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = {
            name: p.detach().double().cpu().clone() for name, p in self.parameters.items()
        }
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update with the given gradients (any floating dtype), all names present."""
        hyper, (beta1, beta2) = self.hyper, self.hyper.betas
        self.steps += 1
        clip = clip_coefficient(gradients, hyper.max_grad_norm)
        for name, parameter in self.parameters.items():
            gradient = gradients[name].detach().double().cpu() * clip
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient.square()
            first = self.first[name] / (1 - beta1**self.steps)
            second = self.second[name] / (1 - beta2**self.steps)
            decayed = parameter * (1 - hyper.lr * hyper.weight_decay)
            self.parameters[name] = decayed - hyper.lr * first / (second.sqrt() + hyper.eps)
        return dict(self.parameters)
