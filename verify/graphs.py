"""The operation graphs that bounds are derived from: the LoRA linear and one AdamW step.

A subject declares where it rounds (:class:`Roundings`); the graph then has one
:func:`~verify.bounds.store` for each stored intermediate and one :func:`~verify.bounds.accumulate`
for each sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from verify.bounds import (
    Accumulator,
    Bounded,
    accumulate,
    exact,
    fixed_point,
    roundings,
    store,
    times,
    where,
)
from verify.oracle.adamw import Hyper
from verify.oracle.philox import rate


@dataclass(frozen=True)
class FixedPoint:
    """Integer token sums: partials over ``shortest`` to ``longest`` tokens, unit 2^-lsb_bits."""

    lsb_bits: int = 40
    longest: int = 128
    shortest: int = 128


@dataclass(frozen=True)
class Roundings:
    """Where a LoRA linear rounds: the dtype an intermediate is stored in, None if it never is.

    ``adapter`` is different: the dtype A and B are cast to on entry. That cast is deterministic, so
    the oracle is given the cast values and it costs no radius.
    """

    adapter: torch.dtype | None
    dropped: torch.dtype | None
    unscaled: torch.dtype | None
    s: torch.dtype | None
    base: torch.dtype | None
    lora: torch.dtype | None
    y: torch.dtype
    ds: torch.dtype | None
    dx: torch.dtype
    sums: torch.dtype = torch.float32
    accumulator: Accumulator = field(default_factory=Accumulator)
    fixed_point: FixedPoint | None = None

    @classmethod
    def everywhere(cls, dtype: torch.dtype, **changes) -> Roundings:
        """The default for a subject that says nothing: every intermediate in the working dtype."""
        every = cls(*[dtype] * 9, sums=dtype)
        return replace(every, **changes)

    @classmethod
    def fused(cls, dtype: torch.dtype, **changes) -> Roundings:
        """S and dS stored once in the working dtype; outputs rounded once; fp32 token sums."""
        return replace(cls(dtype, dtype, None, dtype, None, None, dtype, dtype, dtype), **changes)


@dataclass(frozen=True)
class LinearBounds:
    """Exact values and radii of the four results, shapes as in ``verify.oracle.linear``."""

    y: Bounded
    dx: Bounded
    da: Bounded
    db: Bounded


def lora_linear(
    x, weight, a, b, scale, bias, dy, keep, p, rules: Roundings, divisor=1.0, documents=1
) -> LinearBounds:
    """The graph of forward and backward, arguments as in ``verify.oracle.linear``.

    ``divisor``: of the token sums, with fixed point only. ``documents``: how many separately cut
    pieces the tokens come in; each may end in one chunk shorter than the rules say.
    """
    acc = rules.accumulator
    x, weight, dy = exact(x), exact(weight), exact(dy)
    a, b = (exact(t if rules.adapter is None else t.to(rules.adapter)) for t in (a, b))
    factor = 1.0 / (1.0 - rate(p))
    dropped = x if keep is None else store(where(keep, times(x, factor)), rules.dropped)

    s = store(accumulate([(dropped, a.T)], [], acc), rules.unscaled)
    s = store(times(s, scale), rules.s)
    extras = [] if bias is None else [exact(bias)]
    y = _joined(acc, (x, weight.T), (s, b.T), extras, rules, None, 1.0)

    ds = store(accumulate([(dy, b)], [], acc), rules.unscaled)
    ds = store(times(ds, scale), rules.ds)
    dx = _joined(acc, (dy, weight), (ds, a), [], rules, keep, factor)

    chunks = documents
    if rules.fixed_point is not None:
        chunks += math.ceil(x.value.shape[0] / rules.fixed_point.shortest)
    return LinearBounds(
        y=store(y, rules.y),
        dx=store(dx, rules.dx),
        da=_token_sum(ds, dropped, chunks, rules, divisor),
        db=_token_sum(dy, s, chunks, rules, divisor),
    )


def _joined(acc, base, lora, extras, rules: Roundings, keep, factor) -> Bounded:
    """The base plus the rank-r product, in one accumulator or through stored intermediates."""
    if rules.base is None and rules.lora is None and keep is None:
        return accumulate([base, lora], extras, acc)
    first = store(accumulate([base], [], acc), rules.base)
    second = store(accumulate([lora], [], acc), rules.lora)
    if keep is not None:
        second = store(where(keep, times(second, factor)), rules.lora)
    if rules.base is None:
        return accumulate([], [first, second, *extras], acc)
    # Stored intermediates are added one after the other, each sum stored again (at most one for the
    # bias).
    result = store(accumulate([], [first, *extras], acc), rules.base)
    return accumulate([], [result, second], acc)


def _token_sum(
    left: Bounded, right: Bounded, chunks: int, rules: Roundings, divisor: float
) -> Bounded:
    """left^T right over the tokens: one float sum, or fixed-point partials divided once."""
    fixed = rules.fixed_point
    if fixed is None:
        return store(accumulate([(left.T, right)], [], rules.accumulator), rules.sums)
    total = accumulate([(left.T, right)], [], rules.accumulator, longest=fixed.longest)
    total = fixed_point(total, chunks, fixed.lsb_bits)
    # int64 -> float64 and the division each round once in float64 before the result is stored.
    divided = roundings(Bounded(total.value / divisor, total.radius / divisor), 2, torch.float64)
    return store(divided, rules.sums)


@dataclass
class AdamWBounds:
    """The radius of an AdamW that stores moments and parameters in fp32, one tensor, step by step.

    ``arithmetic``: what single operations round to, fp32 or float64. Counted roundings, for any of
    the usual orders (b1 m + (1 - b1) g, or m + (1 - b1)(g - m)): 4 on the way to the first moment,
    over |m| + (1 - b1)|g|; 5 to the second, over v + (1 - b2) g^2 (the square, the two scalars,
    product and sum); 8 from the moments to the update (two corrections with their scalars, root,
    sum with eps, quotient, product with the rate); 2 for decay and 1 for the difference. A clipped
    gradient has 3 more (the coefficient, its own division, the product).
    """

    parameter: Bounded
    hyper: Hyper
    arithmetic: torch.dtype = torch.float32
    steps: int = 0

    def __post_init__(self) -> None:
        zero = torch.zeros_like(self.parameter.value)
        self.first = Bounded(zero, zero)
        self.second = Bounded(zero, zero)

    def step(self, gradient: torch.Tensor, clip: float, clip_slack: float = 0.0) -> Bounded:
        """The parameter after one step with an exactly known gradient.

        ``clip``: the oracle's coefficient; ``clip_slack``: the relative slack of the subject's rule
        for it.
        """
        hyper, (beta1, beta2) = self.hyper, self.hyper.betas
        self.steps += 1
        g = exact(gradient)
        if clip != 1.0:
            g = Bounded(g.value * clip, g.value.abs() * clip * clip_slack)
            g = self._grown(g, g.magnitude, 3)
        square = Bounded(g.value.square(), g.radius * (2 * g.value.abs() + g.radius))
        self.first = self._moment(self.first, g, beta1, 4)
        self.second = self._moment(self.second, square, beta2, 5)
        update = self._update()
        p, decay = self.parameter, 1 - hyper.lr * hyper.weight_decay
        decayed = Bounded(p.value * decay, p.radius * abs(decay))
        if hyper.weight_decay:
            decayed = self._grown(decayed, decayed.magnitude, 2)
        moved = Bounded(decayed.value - update.value, decayed.radius + update.radius)
        if self.arithmetic != torch.float32:
            moved = self._grown(moved, moved.magnitude, 1)
        self.parameter = store(moved, torch.float32)
        return self.parameter

    def _moment(self, old: Bounded, new: Bounded, beta: float, count: int) -> Bounded:
        moment = Bounded(
            beta * old.value + (1 - beta) * new.value, beta * old.radius + (1 - beta) * new.radius
        )
        return store(
            self._grown(moment, old.magnitude + (1 - beta) * new.magnitude, count), torch.float32
        )

    def _update(self) -> Bounded:
        """lr m^ / (sqrt(v^) + eps) with the radius from the ends of both moments' intervals."""
        hyper, (beta1, beta2) = self.hyper, self.hyper.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        m, v = self.first, self.second
        root = (v.value / correction2).sqrt() + hyper.eps
        root_low = ((v.value - v.radius).clamp(min=0) / correction2).sqrt() + hyper.eps
        rate = hyper.lr / correction1
        # |m'/r' - m/r| <= |m' - m| / r' + |m| |1/r' - 1/r|, largest at the smallest root: the upper
        # end of v moves the quotient by less than the lower end does, because 1/sqrt is convex.
        radius = rate * (m.radius / root_low + m.value.abs() * (1 / root_low - 1 / root))
        return self._grown(Bounded(rate * m.value / root, radius), rate * m.magnitude / root_low, 8)

    def _grown(self, b: Bounded, magnitude: torch.Tensor, count: int) -> Bounded:
        grow = roundings(Bounded(magnitude, torch.zeros_like(magnitude)), count, self.arithmetic)
        return Bounded(b.value, b.radius + grow.radius)
