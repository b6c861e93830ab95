"""One optimiser step of many parameters by two launches: the Triton path of fastlora/optim.py, and the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.kernels import launch
from fastlora.kernels.adamw import FIELDS, adamw_kernel, squares_kernel
from fastlora.kernels.tables import ADAMW_TILE


class Flat(NamedTuple):
    """A parameter of a step, flat and contiguous: its raw gradient (int64 units or fp32), and fp32 p, m and v."""

    raw: torch.Tensor
    p: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor


class Scalars(NamedTuple):
    """What one update is told, in the order in which the kernel reads it; ``divisor`` first, which the norm needs alone."""

    divisor: float
    factor: float = 1.0
    beta1: float = 0.0
    beta1_rest: float = 0.0
    beta2: float = 0.0
    beta2_rest: float = 0.0
    bias1: float = 1.0
    bias2: float = 1.0
    eps: float = 0.0
    decay: float = 1.0
    lr: float = 0.0


class Parameters:
    """Parameters of one device, gradient dtype and group, with the table that the kernels find them by.

    Args:
        flats: at least one; they are kept alive as long as this object.
    """

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.flats = tuple(flats)
        self.device = self.flats[0].p.device
        self.addresses = addresses(flats)
        sizes = torch.tensor([f.p.numel() for f in flats])
        blocks = (sizes + ADAMW_TILE.bm - 1) // ADAMW_TILE.bm
        owner = torch.arange(len(sizes)).repeat_interleave(blocks)
        first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
        table = torch.cat([torch.tensor(self.addresses), sizes[:, None]], 1)
        self._table = table.to(self.device)
        self._where = torch.stack([owner, torch.arange(len(owner)) - first], 1).int().to(self.device)
        self._constants = dict(INTEGER=self.flats[0].raw.dtype == torch.int64, FIELDS=FIELDS, BLOCK=ADAMW_TILE.bm)

    def squares(self, divisor: float) -> torch.Tensor:
        """float64 [blocks]: sums of squares of the gradient / ``divisor``, each of one fixed block."""
        out = torch.empty(len(self._where), dtype=torch.float64, device=self.device)
        self._launch(squares_kernel, Scalars(divisor), out)
        return out

    def update(self, scalars: Scalars) -> None:
        """p, m and v after the step, in place."""
        self._launch(adamw_kernel, scalars)
        # written through addresses, which autograd does not see; copies of A and B are made again when the version changes
        torch.autograd.graph.increment_version([t for flat in self.flats for t in (flat.p, flat.m, flat.v)])

    def _launch(self, kernel, scalars: Scalars, *more: torch.Tensor) -> None:
        on_device = torch.tensor(scalars, dtype=torch.float64).to(self.device)
        launch.run(kernel, (len(self._where),), ADAMW_TILE, self._table, self._where, on_device, *more, **self._constants)


def addresses(flats: Sequence[Flat]) -> list[tuple[int, ...]]:
    """Where the tensors of each parameter lie; equal for parameters that a made table still serves."""
    return [tuple(t.data_ptr() for t in flat) for flat in flats]
