"""A frozen linear layer whose rows do not depend on what else is in the stream.

    Y = x W^T + bias      dX = dY W      (no gradient for W and bias)

On CPU each fixed tile of rows is one product on one thread; on CUDA it is the LoRA linear's own GEMM
at rank 0, whose rows do not depend on their number.
"""

from __future__ import annotations

import torch

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import backend
from fastlora.ops.reference import aligned, over_tiles


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M,P] @ matrix [P,Q] + bias over the fixed tiles of M; fp32 inside, rounded once."""
    out = x.new_empty(x.shape[0], matrix.shape[1])
    matrix = matrix.float()
    bias = None if bias is None else bias.float()

    def tile(item: tuple[int, int, int]) -> None:
        _, start, stop = item
        if x.dtype == torch.float32:
            part = torch.mm(x[start:stop], matrix, out=out[start:stop])
        else:
            part = torch.mm(x[start:stop].float(), matrix)
        if bias is not None:
            part += bias
        if x.dtype != torch.float32:
            out[start:stop] = part

    over_tiles(tile, stream.tiles(x.shape[0]), x.device)
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _product(aligned(x), aligned(weight).t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return _product(aligned(dy), aligned(weight), None), None, None


class _FrozenLinearTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        from fastlora.ops import triton_path  # imported on first use: triton is absent on macOS and Windows

        ctx.save_for_backward(weight)
        return triton_path.frozen_forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        from fastlora.ops import triton_path

        return triton_path.frozen_backward(dy, ctx.saved_tensors[0]), None, None


def frozen_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] in x's dtype, with a gradient for ``x`` only.

    Raises:
        InputError: ``weight`` or ``bias`` requires a gradient, or the dtypes differ.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise InputError("weight, bias: requires_grad is True; frozen_linear needs frozen ones")
    if weight.dtype != x.dtype:
        raise InputError(f"weight: {weight.dtype} for x of {x.dtype}; they must be the same")
    function = _FrozenLinearTriton if backend.pick(x) == "triton" else _FrozenLinear
    y = function.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])
