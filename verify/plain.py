"""An example subject that imports nothing of the library: the LoRA linear in plain torch maths.

It keeps every intermediate in the working dtype and claims nothing about splits. Try it with
``python -m verify --subject verify.plain:SUBJECT``.
"""

from __future__ import annotations

import torch

from verify.graphs import Roundings
from verify.oracle.adamw import Hyper
from verify.oracle.linear import scale_of
from verify.oracle.philox import keep_mask
from verify.subject import GRAD, Documents, LinearInputs, LinearResult, SplitResult, Subject


class PlainLinear:
    """y = x W^T + s D(x) A^T B^T + bias by autograd."""

    modes = (GRAD,)
    dtypes = (torch.float32, torch.bfloat16)
    bitwise_splits = False

    def roundings(self, dtype: torch.dtype, mode: str) -> Roundings:
        """Every intermediate in the working dtype, the token sums too."""
        return Roundings.everywhere(dtype)

    def run(self, inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        """Forward and backward of one call."""
        dtype, keep = inputs.x.dtype, None
        x = inputs.x.detach().clone().requires_grad_()
        a, b = (t.to(dtype).requires_grad_() for t in (inputs.a.clone(), inputs.b.clone()))
        dropped = x
        if inputs.dropout:
            keep = keep_mask(inputs.seed, inputs.tokens, x.shape[1], inputs.dropout)
            dropped = torch.where(keep.to(x.device), x * (1 / (1 - inputs.dropout)), 0.0)
        s = dropped @ a.T * scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        y = torch.nn.functional.linear(x, inputs.weight, inputs.bias) + s @ b.T
        dx, da, db = torch.autograd.grad(y, (x, a, b), inputs.dy)
        return LinearResult(y.detach(), dx, da, db, keep)

    def accumulate(self, parts: list[Documents], mode: str) -> SplitResult:
        """Gradients added in floats, one call a micro-batch, documents laid end to end."""
        da, db, rows, ran = 0.0, 0.0, {}, []
        for part in parts:
            x, dy = torch.cat(part.x), torch.cat(part.dy)
            tokens = torch.cat([torch.arange(len(d)) + (i << 32) for i, d in zip(part.ids, part.x)])
            result = self.run(
                LinearInputs(
                    x,
                    part.weight,
                    part.a,
                    part.b,
                    None,
                    dy,
                    part.alpha,
                    False,
                    part.dropout,
                    tokens,
                    part.seed,
                ),
                GRAD,
            )
            da, db = da + result.da, db + result.db
            sizes = [len(d) for d in part.x]
            pairs = zip(result.y.split(sizes), result.dx.split(sizes))
            rows.update(zip(part.ids, pairs))
            ran.append(len(x))
        return SplitResult(da, db, rows, tuple(ran))


class TorchAdamW:
    """torch.optim.AdamW with torch's own clipping."""

    arithmetic = torch.float32
    clip_epsilon = 1e-6

    def run(self, parameters, gradients, hyper: Hyper) -> list[dict[str, torch.Tensor]]:
        """Parameters after each step."""
        own = {name: torch.nn.Parameter(p.clone()) for name, p in parameters.items()}
        optimizer = torch.optim.AdamW(
            own.values(),
            lr=hyper.lr,
            betas=hyper.betas,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
        )
        after = []
        for step in gradients:
            for name, parameter in own.items():
                parameter.grad = step[name].clone()
            if hyper.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(own.values(), hyper.max_grad_norm)
            optimizer.step()
            after.append({name: p.detach().clone() for name, p in own.items()})
        return after


SUBJECT = Subject("plain torch", "cpu", PlainLinear(), TorchAdamW())
