"""A tiny LoRA linear and model for tests: the attributes the optimiser, digest and report look for."""

from __future__ import annotations

import torch
from torch import nn


class _Sum(torch.autograd.Function):
    """y = x W^T + x A^T B^T; partial dA and dB, one chunk a call, go to the sums given in the forward."""

    @staticmethod
    def forward(ctx, x, weight, a, b, sums):
        ctx.save_for_backward(x, a, b)
        ctx.sums = sums
        return x @ weight.T + x @ a.T @ b.T

    @staticmethod
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        da, db = (dy @ b).T @ x, dy.T @ (x @ a.T)
        if ctx.sums is None:
            return None, None, da, db, None
        for s, partial in zip(ctx.sums, (da, db)):
            s.add_(partial, s.chunks)
        return None, None, None, None, None


class StandInLinear(nn.Module):
    def __init__(self, width: int, out: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width, generator=generator), requires_grad=False)
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.randn(rank, width, generator=generator))
            self.lora_B.weight.zero_()
        self.exact = False
        self.sums = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = self.sums if self.exact else None
        return _Sum.apply(x, self.weight, self.lora_A.weight, self.lora_B.weight, sums)


class StandInModel(nn.Module):
    """Two LoRA linears side by side, a frozen embedding shared with the head, and a frozen norm weight."""

    def __init__(self, width: int = 12, out: int = 10, rank: int = 3, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(width)
        self.q_proj = StandInLinear(width, out, rank, g)
        self.v_proj = StandInLinear(width, out, rank, g)
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(7, width, generator=g))
        for p in (*self.embed.parameters(), *self.norm.parameters()):
            p.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.v_proj(x)

    def fill_b(self, seed: int = 1) -> StandInModel:
        """Make B non-zero, so that A gets a gradient too; returns itself."""
        g = torch.Generator().manual_seed(seed)
        for m in (self.q_proj, self.v_proj):
            m.lora_B.weight.data.copy_(torch.randn(m.lora_B.weight.shape, generator=g))
        return self
