"""gradients: dx, dA and dB are derivatives, by finite differences that know nothing of any backward.

With L = sum of dy * y, the slope of L along a direction u is <dx, u>, and it is also (L(x + u) - L(x - u)) / 2, without
error of truncation whatever the size of u, because y is affine in x, in A and in B, each by itself. L is the float64
forward of the oracle; its hand-derived backward is not used. Directions: signs drawn at random, over all elements, over
one row and over one column, and single elements, where nothing averages out.

Two relations need no oracle at all: dY times a power of two gives each gradient times it, bit for bit where nothing
leaves the range of normal numbers, and gradients of dY1 + dY2 add up.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import torch

from verify import oracle, relations
from verify.bounds import Accumulator
from verify.claims.accuracy import bounds_of
from verify.claims.outcome import Budget, Outcome
from verify.oracle.linear import scale_of
from verify.strategies import LinearCase, affordable, endless, short_names
from verify.subject import GRAD, LinearInputs, LinearResult, Refused, Subject

NAME = "gradients"
STATEMENT = (
    "Along random directions and single elements dx, dA and dB are the slopes that central differences of the float64 "
    "forward give, within the rounding bound; they are linear in dY; and the registered operators pass torch's opcheck."
)


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """opcheck once, then cases in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    part = subject.linear
    if part is None:
        out.reason = "the subject has no LoRA linear"
        return out
    names = short_names(part.dtypes)
    refused = 0
    cases = endless("linear", names, seed, getattr(part, "cases_a_shape", 1))
    for case in (c for c in cases if affordable(c, part)):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        out.cases += 1
        out.tags |= {subject.device, case.dtype, *subject.tags}
        if out.cases == 1:
            _operators(subject, seed, out)
        for mode in part.modes:
            where = f"{subject.name}, {mode}, {case!r}"
            try:
                _one(subject, case, mode, out, where)
            except Refused:
                refused += 1
            # A crash of the subject is a failure of the claim, told with the case.
            except Exception as error:
                out.fail(f"raised {type(error).__name__}: {error}; {where}")
    if refused:
        out.note(f"documented refusals: {refused}")
    out.seconds = time.monotonic() - begun
    return out


def _one(subject: Subject, case: LinearCase, mode: str, out: Outcome, where: str) -> None:
    part, inputs = subject.linear, case.inputs(subject.device)
    result = part.run(inputs, mode)
    rules = part.roundings(inputs.x.dtype, mode)
    bounds = bounds_of(inputs, result, rules, 1.0)
    loss = _Loss(inputs, result, rules)
    draw = torch.Generator().manual_seed(case.seed)
    for name, argument in (("dx", "x"), ("da", "a"), ("db", "b")):
        got, bound = getattr(result, name).detach().double().cpu(), getattr(bounds, name)
        if not got.numel() or not bool(bound.radius.isfinite().all()):
            continue
        for told, direction in _directions(got.shape, draw):
            slope, slack = loss.slope(argument, direction)
            radius = float((bound.radius * direction.abs()).sum()) + slack
            error = abs(float((got * direction).sum()) - slope)
            share = error / radius if error else 0.0
            sentence = (
                f"the slope of {name} along {told} is {float((got * direction).sum()):.9g}, by differences {slope:.9g}"
            )
            out.share(math.inf if math.isnan(share) else share, f"{sentence}, allowed {radius:.3g}; {where}")
    for failed, share, sentence in relations.linear_in_dy(part, inputs, mode, result, bounds):
        if failed is not None:
            out.check(not failed, f"{sentence}; {where}")
        else:
            out.share(share, f"{sentence}; {where}")


def _directions(shape: torch.Size, draw: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    signs = (torch.randint(0, 2, shape, generator=draw) * 2 - 1).double()
    yield "all elements", signs
    row, column = (int(torch.randint(0, n, (), generator=draw)) for n in shape)
    for told, place in ((f"row {row}", (row, slice(None))), (f"column {column}", (slice(None), column))):
        only = torch.zeros_like(signs)
        only[place] = signs[place]
        yield told, only
    last = tuple(n - 1 for n in shape)
    for place in ((0, 0), last, (row, column)):
        only = torch.zeros_like(signs)
        only[place] = 1.0
        yield f"element {list(place)}", only


class _Loss:
    """L(x, A, B) of one call in float64, with the mask that the subject used and the A and B that it reads."""

    def __init__(self, inputs: LinearInputs, result: LinearResult, rules) -> None:
        cast = (lambda t: t) if rules.adapter is None else (lambda t: t.to(rules.adapter))
        self.at = {"x": inputs.x.cpu().double(), "a": cast(inputs.a.cpu()).double(), "b": cast(inputs.b.cpu()).double()}
        self.dy, self.weight = inputs.dy.cpu().double(), inputs.weight.cpu().double()
        self.scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        self.keep, self.p = None if result.keep is None else result.keep.cpu(), inputs.dropout

    def _value(self, at: dict[str, torch.Tensor], weight: torch.Tensor, dy: torch.Tensor) -> float:
        y = oracle.lora_linear_forward(at["x"], weight, at["a"], at["b"], self.scale, keep=self.keep, p=self.p)
        return float((dy * y).sum())

    def slope(self, argument: str, direction: torch.Tensor) -> tuple[float, float]:
        """(L(+u) - L(-u)) / 2 along u, and how far float64 may be off: gamma_n of the absolute terms for the n
        roundings on the longest path, for each of the two."""
        # A step of the argument's own size: beside 2^120 a step of 1 would be lost in float64.
        top = float(self.at[argument].abs().max())
        step = 2.0 ** math.frexp(top)[1] if top else 1.0
        low, high = dict(self.at), dict(self.at)
        high[argument] = self.at[argument] + step * direction
        low[argument] = self.at[argument] - step * direction
        slope = (self._value(high, self.weight, self.dy) - self._value(low, self.weight, self.dy)) / 2 / step
        size = {name: t.abs() for name, t in self.at.items()}
        size[argument] = size[argument] + step * direction.abs()
        terms = self._value(size, self.weight.abs(), self.dy.abs()) / step
        count = torch.tensor(float(sum(self.weight.shape) + self.at["a"].shape[0] + self.dy.numel() + 8))
        return slope, float(Accumulator(torch.float64).factor(count)) * terms


def _operators(subject: Subject, seed: int, out: Outcome) -> None:
    """torch.library.opcheck of every operator that the subject registered: schema, autograd, fakes, aot dispatch."""
    operators = getattr(subject.linear, "operators", None)
    if operators is None:
        out.note("opcheck not tried: the subject registers no operators")
        return
    names = short_names(subject.linear.dtypes)
    cases = (c for c in endless("linear", names, seed) if affordable(c, subject.linear))
    plain = next(c for c in cases if c.m > 1 and c.dtype == names[0] and c.values == "normal")
    count = 0
    for dropout in (0.0, 0.5):
        case = dataclasses.replace(plain, dropout=dropout, layout="plain", k=min(plain.k, 48), n=min(plain.n, 48))
        for operator, arguments in operators(case.inputs(subject.device)):
            count += 1
            try:
                torch.library.opcheck(operator, arguments)
            # opcheck raises its own kinds of error, one for each of its tests.
            except Exception as error:
                told = str(error).strip().splitlines()
                out.fail(f"opcheck of {operator} raised {type(error).__name__}: {' '.join(told[:3])}; {case!r}")
    out.note(f"opcheck: {count} calls of registered operators (mode {GRAD!r})")
