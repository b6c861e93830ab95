"""RMSNorm with a frozen weight: over fixed tiles of rows, or by the Triton kernel (kernels/rms_norm.py), a row at a time.

    n = x / sqrt(mean(x^2) + eps)      y = w n
    dn = w dy                          dx = (dn - n mean(n dn)) / sqrt(mean(x^2) + eps)

Means run over the features of one row; all in fp32. Models differ in where they round to their own
dtype, which the ``style`` says. Source: Zhang and Sennrich, "Root mean square layer normalization"
(2019).
"""

from __future__ import annotations

import torch

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import backend
from fastlora.ops.reference import aligned, over_tiles

# round(n) then times w (Llama); w in fp32, then rounded (OLMo 2); (1 + w) in fp32 (Gemma).
STYLES = ("round_first", "round_last", "offset")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, style):
        x = aligned(x)
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=torch.float32)
        factor = weight if style == "round_first" else weight.float()
        factor = 1.0 + factor if style == "offset" else factor

        def tile(item: tuple[int, int, int]) -> None:
            _, start, stop = item
            part = x[start:stop].float()
            r = torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps)
            rstd[start:stop] = r
            n = part * r
            if style == "round_first":
                torch.mul(n.to(x.dtype), factor, out=y[start:stop])
            else:
                y[start:stop] = n.mul_(factor)

        over_tiles(tile, stream.tiles(x.shape[0]), x.device)
        ctx.save_for_backward(x, factor, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, factor, rstd = ctx.saved_tensors
        dy, factor, dx = aligned(dy), factor.float(), torch.empty_like(x)

        def tile(item: tuple[int, int, int]) -> None:
            _, start, stop = item
            r = rstd[start:stop]
            n = x[start:stop].float() * r
            dn = dy[start:stop].float() * factor
            mean = (n * dn).mean(-1, keepdim=True)
            dx[start:stop] = dn.sub_(n.mul_(mean)).mul_(r)

        over_tiles(tile, stream.tiles(x.shape[0]), x.device)
        return dx, None, None, None


class _RmsNormTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, style):
        # imported on first use: triton is absent on macOS and Windows
        from fastlora.kernels.rms_norm import norm_forward

        y, rstd, x = norm_forward(x, weight, eps, style)
        ctx.save_for_backward(x, weight, rstd)
        ctx.style = style
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        from fastlora.kernels.rms_norm import norm_backward

        x, weight, rstd = ctx.saved_tensors
        return norm_backward(dy, x, rstd, weight, ctx.style)[0], None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, style: str = "round_first"
) -> torch.Tensor:
    """x [..., H] normalised over H and scaled by the frozen weight [H]; the result in x's dtype.

    Raises:
        InputError: ``weight`` requires a gradient, or an unknown ``style`` (see ``STYLES``).
    """
    if weight.requires_grad:
        raise InputError("weight: requires_grad is True; rms_norm needs a frozen one")
    if style not in STYLES:
        raise InputError(f"style is {style!r}; allowed are {', '.join(STYLES)}")
    function = _RmsNormTriton if backend.pick(x) == "triton" else _RmsNorm
    return function.apply(x.reshape(-1, x.shape[-1]), weight, eps, style).reshape(x.shape)
