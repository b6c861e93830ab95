"""How errors lie within their bounds: a count of elements by share of the bound, in powers of two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

# Bin i counts shares in (2^(LOWEST + i - 1), 2^(LOWEST + i)]; the first holds all below too, the last all above 1.
LOWEST = -16
BINS = -LOWEST + 2


@dataclass
class Histogram:
    """``exact`` elements had no error at all; ``counts`` has BINS entries, the last for shares above 1."""

    exact: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, shares: torch.Tensor) -> None:
        """Count shares of a bound, 0 or more; NaN counts as above 1."""
        self.exact += int((shares == 0).sum())
        rest = shares[shares != 0].double().nan_to_num(nan=2.0)
        places = (rest.log2().ceil().clamp(LOWEST, 1) - LOWEST).long()
        for place, count in enumerate(torch.bincount(places, minlength=BINS).tolist()):
            self.counts[place] += count

    @property
    def total(self) -> int:
        """All elements judged."""
        return self.exact + sum(self.counts)

    def as_dict(self) -> dict:
        """Upper edges of the bins (None for the last, which has none) and their counts."""
        edges = [2.0 ** (LOWEST + i) for i in range(BINS - 1)] + [None]
        return {"exact": self.exact, "edges": edges, "counts": list(self.counts)}


_WATCHED: list[Histogram] = []


@contextlib.contextmanager
def watching(histogram: Histogram) -> Iterator[None]:
    """Every element that is judged inside is counted."""
    _WATCHED.append(histogram)
    try:
        yield
    finally:
        _WATCHED.remove(histogram)


def count(shares: torch.Tensor) -> None:
    """Count shares in every histogram that watches."""
    for histogram in _WATCHED:
        histogram.add(shares)
