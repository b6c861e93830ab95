"""A subject made of plain functions: what somebody who wrote a kernel has to give.

:class:`FunctionLinear` takes a differentiable function, or a forward with its own backward, and writes the rest of the
protocol; :func:`block` and :func:`loss` make operations of functions on rows of documents; :class:`FunctionOptimizer`
takes a torch optimiser. ``examples/verify_my_kernel.py`` uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from verify.graphs import Roundings
from verify.oracle.adamw import Hyper
from verify.oracle.linear import scale_of
from verify.oracle.philox import keep_mask, rate
from verify.subject import DOCUMENT, GRAD, Documents, LinearInputs, LinearResult, Operation, Packed, SplitResult


class FunctionLinear:
    """The linear part of a subject, from one differentiable function.

    Args:
        forward: ``forward(x, weight, a, b, scale, bias)`` gives y [M, N] from x [M, K], weight [N, K], a [r, K], b [N, r],
            a number, and bias [N] or None. With ``dropout`` True it also gets ``keep`` (bool [M, K], or None) and p,
            a multiple of 2^-16.
        dtypes: working dtypes to try.
        roundings: where it rounds, for a working dtype; by default every intermediate is in the working dtype.
        cast: whether A and B (fp32) are cast to the working dtype before the call.
        dropout: whether it takes a mask; if not, calls with dropout are run and judged without, and where cuts of a batch are
            compared the harness drops elements of x itself.
        bitwise_splits: whether it claims equal bits under every cut of a batch.
    """

    modes = (GRAD,)

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
        roundings: Callable[[torch.dtype], Roundings] = Roundings.everywhere,
        cast: bool = True,
        dropout: bool = False,
        bitwise_splits: bool = False,
    ) -> None:
        self.forward, self.dtypes, self._roundings = forward, dtypes, roundings
        self.cast, self.dropout, self.bitwise_splits = cast, dropout, bitwise_splits

    def roundings(self, dtype: torch.dtype, mode: str) -> Roundings:
        """As declared."""
        return self._roundings(dtype)

    def run(self, inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        """One call, and its backward by autograd."""
        x = inputs.x.detach().clone().requires_grad_()
        dtype = x.dtype if self.cast else torch.float32
        a, b = (t.detach().to(dtype, copy=True).requires_grad_() for t in (inputs.a, inputs.b))
        keep, more = None, ()
        if self.dropout:
            if inputs.dropout:
                keep = keep_mask(inputs.seed, inputs.tokens, x.shape[1], inputs.dropout)
            more = (None if keep is None else keep.to(x.device), rate(inputs.dropout))
        scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        y = self.forward(x, inputs.weight, a, b, scale, inputs.bias, *more)
        dx, da, db = torch.autograd.grad(y, (x, a, b), inputs.dy)
        return LinearResult(y.detach(), dx, da, db, keep)

    def accumulate(self, parts: list[Documents], mode: str) -> SplitResult:
        """Gradients added in floats, one call a micro-batch, documents laid end to end."""
        da, db, rows, ran = 0.0, 0.0, {}, []
        for part in parts:
            tokens = torch.cat([torch.arange(len(d)) + (i << 32) for i, d in zip(part.ids, part.x)])
            x = torch.cat(part.x)
            if part.dropout and not self.dropout:
                keep = keep_mask(part.seed, tokens, x.shape[1], part.dropout).to(x.device)
                x = torch.where(keep, x / (1 - rate(part.dropout)), 0.0).to(x.dtype)
            inputs = LinearInputs(
                x, part.weight, part.a, part.b, None, torch.cat(part.dy), part.alpha, False, part.dropout,
                tokens, part.seed,
            )  # fmt: skip
            result = self.run(inputs, GRAD)
            da, db = da + result.da, db + result.db
            sizes = [len(d) for d in part.x]
            rows.update(zip(part.ids, zip(result.y.split(sizes), result.dx.split(sizes))))
            ran.append(len(inputs.x))
        return SplitResult(da, db, rows, tuple(ran))


class FunctionOptimizer:
    """The optimiser part, from ``make(parameters, hyper)`` which gives a torch optimiser.

    Args:
        arithmetic: what its single operations round to.
        clip: called with the parameters and the largest norm before each step that clips.
        clip_epsilon: what that rule adds to the norm.
    """

    def __init__(
        self,
        make: Callable[[list[torch.nn.Parameter], Hyper], torch.optim.Optimizer],
        arithmetic: torch.dtype = torch.float32,
        clip: Callable = torch.nn.utils.clip_grad_norm_,
        clip_epsilon: float = 1e-6,
    ) -> None:
        self.make, self.arithmetic, self.clip, self.clip_epsilon = make, arithmetic, clip, clip_epsilon

    def run(
        self, parameters: dict[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]], hyper: Hyper
    ) -> list[dict[str, torch.Tensor]]:
        """Parameters after each step."""
        own = {name: torch.nn.Parameter(p.clone()) for name, p in parameters.items()}
        optimizer, after = self.make(list(own.values()), hyper), []
        for step in gradients:
            for name, parameter in own.items():
                parameter.grad = step[name].clone()
            if hyper.max_grad_norm is not None:
                self.clip(own.values(), hyper.max_grad_norm)
            optimizer.step()
            after.append({name: p.detach().clone() for name, p in own.items()})
        return after


@dataclass(frozen=True)
class Operations:
    """The operations part, a list made by :func:`block` and :func:`loss`."""

    operations: tuple[Operation, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    alignment: int = 16
    streams: tuple[int, ...] = (128, 256)
    documents: int = 3


def block(name: str, features: int, outputs: int, forward: Callable[..., torch.Tensor], sees: str = DOCUMENT) -> Operation:
    """An operation: ``forward(x, lengths, seed)`` gives y [T, outputs] from a stream x [T, features] of documents.

    It draws its weights from ``seed``. ``sees``: ROW if a row's result depends on that row alone, else DOCUMENT.
    """

    def run(packed: Packed) -> dict[str, list[torch.Tensor]]:
        x = packed.x.detach().clone().requires_grad_()
        y = forward(x, packed.lengths, packed.seed)
        (dx,) = torch.autograd.grad(y, (x,), packed.dy)
        return {"y": packed.cut(y.detach()), "dx": packed.cut(dx)}

    return Operation(name, features, outputs, run, sees)


def loss(name: str, features: int, classes: int, forward: Callable[..., torch.Tensor]) -> Operation:
    """A loss: ``forward(x, labels, seed)`` gives the sum over tokens (0-d); labels are int64 [T], -100 where none."""

    def run(packed: Packed) -> dict[str, list[torch.Tensor]]:
        x = packed.x.detach().clone().requires_grad_()
        labels = torch.full((len(x),), -100, device=x.device)
        for name, (start, stop) in zip(packed.ids, packed.spans):
            labels[start:stop] = (torch.arange(stop - start, device=x.device) * 37 + name) % classes
        (dx,) = torch.autograd.grad(forward(x, labels, packed.seed), (x,))
        return {"dx": packed.cut(dx)}

    return Operation(name, features, 1, run)
