"""How sharp a claim is: the smallest planted deviation that it catches, beside the largest error of a sound subject.

In each case one element is moved outward by a multiple of its own bound, the element with the widest bound. What hides
is a deviation that stays inside; where bounds are far wider than errors (a worst case over many roundings, which errors
of both signs never reach) the ratio of the two says how much. Claims about bits are moved by one bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from verify.bounds import Bounded, exact
from verify.claims import CLAIMS
from verify.claims.accuracy import OUTPUTS, bounds_of
from verify.claims.outcome import Budget
from verify.graphs import AdamWBounds
from verify.judge import judge
from verify.mutants import order, rows
from verify.mutants.base import Wrapped
from verify.oracle.adamw import clip_coefficient
from verify.subject import EXACT, Subject

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0, 16.0, 64.0, 256.0)
CASES = 24


@dataclass(frozen=True)
class Sharpness:
    """One row, over CASES cases.

    Attributes:
        used: the largest share of its bound that a sound subject used; ``typical``: the median of the cases' largest.
        caught: the smallest deviation, in bounds, that is caught in some case; ``always``: in every case.
        told: what was planted. All figures are None where bits are compared.
    """

    claim: str
    what: str
    subject: str
    used: float | None
    typical: float | None
    caught: float | None
    always: float | None
    told: str

    @property
    def ratio(self) -> float | None:
        """What is caught in every case over what a sound subject uses in the middle one."""
        return self.always / self.typical if self.always and self.typical else None


@dataclass
class _Seen:
    """Largest share and smallest deviation caught, case by case."""

    shares: list[float] = field(default_factory=list)
    caught: list[float] = field(default_factory=list)

    def look(self, tensor: torch.Tensor, bound: Bounded) -> None:
        if not bool((bound.radius.isfinite() & (bound.radius > 0)).any()):
            return  # every deviation from an exact value is caught
        self.shares.append(judge(tensor, bound).share)
        steps = (by for by in LADDER if judge(_outward(tensor, bound, by), bound).share > 1)
        self.caught.append(next(steps, float("inf")))

    def row(self, claim: str, what: str, subject: str) -> Sharpness:
        used, typical = max(self.shares), statistics.median(self.shares)
        told = f"one element moved outward, {len(self.shares)} calls"
        return Sharpness(claim, what, subject, used, typical, min(self.caught), max(self.caught), told)


def measure(subject: Subject, seed: int) -> Iterator[Sharpness]:
    """A row for each output of ``accuracy``, for the optimiser, and for claims about bits."""
    if subject.linear is not None:
        seen = {name: _Seen() for name in OUTPUTS}
        CLAIMS["accuracy"].run(replace(subject, linear=_watched_linear(subject.linear, seen)), Budget(cases=CASES), seed)
        yield from (found.row("accuracy", name, subject.name) for name, found in seen.items())
    if subject.optimizer is not None:
        alone, found = replace(subject, trainer=None), _Seen()
        watched = replace(alone, optimizer=_watched_optimizer(alone.optimizer, found))
        CLAIMS["updates"].run(watched, Budget(cases=CASES), seed)
        yield found.row("updates", "first step of B", subject.name)
    for mutant in (*order.MUTANTS, *rows.MUTANTS):
        if mutant.name.startswith("one bit") and not mutant.why_unseen(subject):
            found = CLAIMS[mutant.killer].run(mutant.plant(subject), Budget(cases=CASES, stop_at_failure=True), seed)
            told = f"one bit of one element: {'caught' if found.failures else 'NOT caught'}"
            yield Sharpness(mutant.killer, "bits", subject.name, None, None, None, None, told)


def _watched_linear(part, seen: dict[str, _Seen]) -> Wrapped:
    def run(inputs, mode, divisor=1.0):
        result = part.run(inputs, mode, divisor)
        rules = part.roundings(inputs.x.dtype, mode)
        bounds = bounds_of(inputs, result, rules, divisor if mode == EXACT else 1.0)
        for name, found in seen.items():
            found.look(getattr(result, name), getattr(bounds, name))
        return result

    return Wrapped(part, run=run)


def _watched_optimizer(part, found: _Seen) -> Wrapped:
    def run(parameters, gradients, hyper):
        after = part.run(parameters, gradients, hyper)
        clip = clip_coefficient(gradients[0], hyper.max_grad_norm)
        slack = 0.0 if clip == 1.0 else part.clip_epsilon * clip / hyper.max_grad_norm
        bound = AdamWBounds(exact(parameters["lora_B"]), hyper, arithmetic=part.arithmetic)
        found.look(after[0]["lora_B"], bound.step(gradients[0]["lora_B"], clip, slack))
        return after

    return Wrapped(part, run=run)


def _outward(tensor: torch.Tensor, bound: Bounded, by: float) -> torch.Tensor:
    """The element of the widest bound, moved by ``by`` of it in the direction in which it errs."""
    flat = tensor.detach().double().cpu().flatten()
    value, radius = bound.value.flatten(), bound.radius.flatten()
    place = int(torch.where(radius.isfinite(), radius, -1.0).argmax())
    sign = 1.0 if flat[place] >= value[place] else -1.0
    flat[place] += sign * by * radius[place]
    return flat.view(tensor.shape)


