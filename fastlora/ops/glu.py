"""The gate of a gated feed-forward layer: over fixed tiles of rows, or by the Triton kernel (kernels/glu.py).

    h = act(g) * u        dg = dh u act'(g)        du = dh act(g)

Source: Shazeer, "GLU variants improve transformer" (2020). act(g) is rounded to the dtype of ``g``
before the product, as the models do; the backward computes it again instead of keeping it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import backend
from fastlora.ops.reference import aligned, over_tiles

# name -> (function, its derivative times a gradient)
ACTIVATIONS = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        gate, up = aligned(gate), aligned(up)
        act, _ = ACTIVATIONS[activation]
        h = torch.empty_like(gate)

        def tile(item: tuple[int, int, int]) -> None:
            _, start, stop = item
            torch.mul(act(gate[start:stop]), up[start:stop], out=h[start:stop])

        over_tiles(tile, stream.tiles(gate.shape[0]), gate.device)
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dh = aligned(dh)
        act, derivative = ACTIVATIONS[ctx.activation]
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)

        def tile(item: tuple[int, int, int]) -> None:
            _, start, stop = item
            g, d = gate[start:stop], dh[start:stop]
            torch.mul(d, act(g), out=dup[start:stop])
            dgate[start:stop] = derivative(d * up[start:stop], g)

        over_tiles(tile, stream.tiles(gate.shape[0]), gate.device)
        return dgate, dup, None


class _GluTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        # imported on first use: triton is absent on macOS and Windows
        from fastlora.kernels.glu import glu_pair_forward

        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_pair_forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        from fastlora.kernels.glu import glu_pair_backward

        gate, up = ctx.saved_tensors
        return *glu_pair_backward(dh, gate, up, ctx.activation), None


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up for [..., F] tensors of one shape and dtype.

    Raises:
        InputError: shapes or dtypes differ, or an unknown activation (see ``ACTIVATIONS``).
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            f"gate {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}: must agree"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    width = gate.shape[-1]
    function = _GluTriton if backend.pick(gate) == "triton" else _Glu
    return function.apply(gate.reshape(-1, width), up.reshape(-1, width), activation).reshape(gate.shape)
