"""The blocks in plain torch: what a frozen model runs, PEFT's maths on top, and both in a wider dtype as references."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, linear, silu


def lora(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """PEFT's linear: x [M, K], weight [N, K], a [r, K], b [N, r] -> [M, N]."""
    return linear(x, weight) + linear(linear(x, a), b) * scale


def frozen_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The SwiGLU feed-forward layer."""
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def lora_mlp(x: torch.Tensor, weights, factors, scale: float, gate=None) -> torch.Tensor:
    """The same with an adapter on each projection; ``gate`` may compute act(g) * u instead of torch."""
    g, u = (lora(x, w, *ab, scale) for w, ab in zip(weights[:2], factors[:2]))
    hidden = silu(g) * u if gate is None else gate(g, u)
    return lora(hidden, weights[2], *factors[2], scale)


def lora_qkv(x: torch.Tensor, weights, factors, scale: float) -> tuple[torch.Tensor, ...]:
    """Query, key and value with adapters."""
    return tuple(lora(x, w, *ab, scale) for w, ab in zip(weights, factors))


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in x's dtype throughout: a reference, in a wide dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [M, heads, D] by cos, sin [M, D], halves as transformers lays them out."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


def angles(tokens: int, head_dim: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [M, D] of positions 0 to M - 1."""
    rates = 500000.0 ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), rates)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Head and summed cross-entropy as transformers computes them: logits in the working dtype, then fp32."""
    logits = linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, labels, reduction="sum")


def wider(dtype: torch.dtype) -> torch.dtype:
    """A reference's dtype: fp32 for 16 bits, float64 for fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32
