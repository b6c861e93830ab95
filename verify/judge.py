"""Error as a share of its bound: the one comparison every numeric claim uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verify import histogram
from verify.bounds import Bounded, at_home

# The radius, the error and their quotient are float64 numbers themselves, each rounded by at most 2^-53: an error at the
# very end of its interval must not come out above 1.
SLACK = 2.0**-50


@dataclass(frozen=True)
class Judged:
    """``share``: the largest error over its radius (above 1 is a failure); ``where``: its index."""

    share: float
    where: tuple[int, ...]
    got: float
    expected: float
    radius: float
    skipped: int

    def sentence(self, name: str) -> str:
        """One line that needs no source reading."""
        return (
            f"{name}{list(self.where)} is {self.got:.9g}, exact {self.expected:.9g}, allowed error "
            f"{self.radius:.3g}: {self.share:.3g} of its bound"
        )


def judge(got: torch.Tensor, bound: Bounded) -> Judged:
    """Compare element by element; an infinite radius (an overflow to be expected) is skipped,
    counted.

    An error of 0 has share 0 whatever the radius; any error over a radius of 0, NaN, or a wrong
    shape has share infinity.
    """
    got = at_home(got).double()
    if got.shape != bound.value.shape:
        return Judged(float("inf"), (), float(got.numel()), float(bound.value.numel()), 0.0, 0)
    if got.numel() == 0:
        return Judged(0.0, (), 0.0, 0.0, 0.0, 0)
    error = (got - bound.value).abs()
    share = torch.where(error == 0, torch.zeros_like(error), error / (bound.radius * (1 + SLACK)))
    share = torch.where(share.isnan(), torch.full_like(share, float("inf")), share)
    judged = bound.radius.isfinite()
    histogram.count(share[judged])
    share = torch.where(judged, share, torch.zeros_like(share))
    flat = int(share.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), share.shape))
    return Judged(
        share=float(share[where]),
        where=where,
        got=float(got[where]),
        expected=float(bound.value[where]),
        radius=float(bound.radius[where]),
        skipped=int((~judged).sum()),
    )


def around(value: torch.Tensor, bound: Bounded) -> Bounded:
    """The graph's radius around the oracle's value, widened by how far float64 takes the two apart.

    That is float64 rounding, about 2^-52 of the terms and 2^-29 of an fp32 radius; where the radius
    is 0 all sums are exact and the two agree. ``tests/meta`` holds the two against each other.
    """
    return Bounded(value, bound.radius + (value - bound.value).abs())
