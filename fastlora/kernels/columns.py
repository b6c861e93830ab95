"""How the rank columns of several projections of one input lie side by side in S and dS."""

from __future__ import annotations

import dataclasses
import functools

import torch

from fastlora.kernels.launch import padded_rank

# Projections of one input: query, key and value are the most any family has.
MOST = 3


def starts_and_widths(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and widths of :data:`MOST` ranges of features, as kernels take them: those that are missing are empty."""
    return tuple(zip(*(*ranges, *[(0, 0)] * (MOST - len(ranges)))))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Layout of the low-rank side of up to three projections that read one input.

    Attributes:
        ranks: the rank of each, without padding.
        starts, widths: the range of output features of each in the side-by-side output; ranges of projections without an adapter
            lie in no one's.
        scales: what S and dS of each are multiplied by.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    scales: tuple[float, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.ranks, self.starts, self.widths, self.scales))

    def __hash__(self) -> int:
        """Worked out once: plans of launches are looked up by layouts."""
        return self._hash

    @functools.cached_property
    def count(self) -> int:
        """Projections with an adapter."""
        return len(self.ranks)

    @functools.cached_property
    def rank(self) -> int:
        """The largest rank: rows a projection has in the sum of dA."""
        return max(self.ranks)

    @functools.cached_property
    def padded(self) -> int:
        """Columns a projection has in S: the largest rank, padded."""
        return padded_rank(self.rank)

    @functools.cached_property
    def columns(self) -> int:
        """Columns of S: a power of two; those of no projection are zero."""
        return padded_rank(self.count * self.padded)

    @functools.cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, width) of each projection's output features."""
        return tuple(zip(self.starts, self.widths))

    def scale_of_columns(self, device: torch.device) -> torch.Tensor:
        """fp32 [columns]: the scale of each column; made once a device."""
        return _scales(self.scales, self.padded, self.columns, device)


@functools.lru_cache(maxsize=256)
def _scales(scales: tuple[float, ...], padded: int, columns: int, device: torch.device) -> torch.Tensor:
    full = [scale for scale in scales for _ in range(padded)]
    return torch.tensor(full + [0.0] * (columns - len(full)), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def single(rank: int, features: int, scale: float) -> Columns:
    """The layout of one projection by itself."""
    return Columns((rank,), (0,), (features,), (scale,))
