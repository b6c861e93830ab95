"""Fused blocks of the library as single operations: what its decoder layer does between its norms, cut out to be timed."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

import fastlora
from bench.cases import kernels_run
from bench.peers import random_b
from fastlora.exact import discard, exact
from fastlora.inject import lora_layers


def _chunks(dy):
    from fastlora.ops.triton_path import chunks_here

    return chunks_here(dy)


def _beside(dy):
    from fastlora.ops.beside import Beside

    return Beside(dy.device)


class Group(torch.autograd.Function):
    """Projections of one input as one product, x [M, K] -> [M, N]."""

    @staticmethod
    def forward(ctx, x, group, *parameters):
        y, s = group.forward(x, None)
        ctx.save_for_backward(x, s)
        ctx.group = group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        chunks = _chunks(dy)
        with _beside(dy) as beside:
            dx, ds, db = ctx.group.backward(dy, s, None, chunks, beside, x)
            found = beside.add(ctx.group.gradients, x, ds, db, None, chunks)
        return dx, None, *found.value


class Mlp(torch.autograd.Function):
    """The SwiGLU layer: gate and up in one product, the gate, down. The gate's product is computed again in the backward."""

    @staticmethod
    def forward(ctx, x, gate_up, down, *parameters):
        from fastlora.ops.gated import gated_forward

        both, s, hidden = gated_forward(gate_up, x, None, "silu")
        y, s_down = down.forward(hidden, None)
        ctx.save_for_backward(x, both, s, s_down)
        ctx.groups = gate_up, down
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        from fastlora.ops.gated import gated_backward

        x, both, s, s_down = ctx.saved_tensors
        gate_up, down = ctx.groups
        chunks = _chunks(dy)
        with _beside(dy) as beside:
            dboth, hidden, ds, db = gated_backward(down, dy, s_down, None, chunks, both, "silu", beside)
            of_down = beside.add(down.gradients, hidden, ds, db, None, chunks)
            dx, ds, db = gate_up.backward(dboth, s, None, chunks, beside, x)
            of_gate_up = beside.add(gate_up.gradients, x, ds, db, None, chunks)
        return dx, None, None, *of_gate_up.value, *of_down.value


class Adapted:
    """Linear layers with the library's adapters: fused groups where kernels run, a layer at a time elsewhere.

    Args:
        weights: [N, K] by name, frozen; the parameters share their memory until a group puts them together.
        groups: names of the layers of each product.
    """

    def __init__(self, weights: dict[str, torch.Tensor], groups: list[list[str]], rank: int, device: str) -> None:
        self.net = nn.Module()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            self.net.add_module(name, layer)
        fastlora.inject(self.net, fastlora.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(weights)), seed=1)
        random_b(self.net, rank, torch.Generator(device).manual_seed(2))
        self.groups = None
        if kernels_run(device, next(iter(weights.values())).dtype):
            from fastlora.ops.projections import Projections

            self.groups = [Projections([getattr(self.net, name) for name in names]) for names in groups]
            for group in self.groups:
                group.attach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B in the order of the groups."""
        return [p for group in self.groups for p in group.parameters]

    def prepared(self) -> list:
        """The groups with weights together and 16-bit copies up to date."""
        for group in self.groups:
            group.prepare()
        return self.groups

    def exact_block(self, stack: contextlib.ExitStack) -> None:
        """Collect exact sums until ``stack`` closes; a step has one such block for all its layers."""
        stack.callback(discard, self.net)
        stack.enter_context(exact(self.net))

    def factors(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each layer in ``dtype``."""
        return [(m.lora_A.weight.detach().to(dtype), m.lora_B.weight.detach().to(dtype)) for m in lora_layers(self.net)]

    def sums(self) -> dict[str, torch.Tensor]:
        """dA and dB of each layer from the exact sums."""
        found = {}
        for layer in lora_layers(self.net):
            found[f"{layer.path}.lora_A"], found[f"{layer.path}.lora_B"] = (s.gradient(1.0) for s in layer.sums)
        return found
