"""The LoRA linear (plain form until the registered operator lands)."""

from __future__ import annotations

import torch

from fastlora.ops import reference


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, scale, bias, dropout, key, sums):
        y, s = reference.forward_ref(x, weight, a, b, scale, bias, dropout, key)
        ctx.save_for_backward(x, weight, a, b, s)
        ctx.rest = (scale, dropout, key, sums)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s = ctx.saved_tensors
        scale, dropout, key, sums = ctx.rest
        sums_a, sums_b = sums if sums is not None else (None, None)
        dx, da, db = reference.backward_ref(
            dy.contiguous(), x, weight, a, b, s, scale, dropout, key,
            needs_dx=ctx.needs_input_grad[0], sums_a=sums_a, sums_b=sums_b,
        )
        return dx, None, da, db, None, None, None, None, None


def lora_linear(x, weight, a, b, scale, bias=None, *, dropout=0.0, key=None, sums=None):
    """Y = x W^T + scale * D(x) A^T B^T + bias."""
    flat = x.reshape(-1, x.shape[-1])
    y = _LoraLinear.apply(flat, weight, a, b, scale, bias, dropout, key, sums)
    return y.reshape(*x.shape[:-1], weight.shape[0])
