"""Triton's interpreter with the programs of every grid in a shuffled order.

The interpreter runs one program after another, always in the same order, so a kernel whose result depends on the order of
its programs looks sound there. Here each launch runs them in an order of its own, drawn from ``seed``; which programs run
does not change.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Shuffle every launch in Triton's interpreter; where it is not switched on nothing changes."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    draw = torch.Generator().manual_seed(seed)
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    grid: list[int] = [1, 1, 1]
    order: list[int] = [0]

    def begin(*dim: int) -> None:
        grid[:] = dim
        order[:] = torch.randperm(math.prod(grid), generator=draw).tolist()
        set_dim(*dim)

    def place(x: int, y: int, z: int) -> None:
        own = order[(x * grid[1] + y) * grid[2] + z]
        set_index(own // (grid[1] * grid[2]), own // grid[2] % grid[1], own % grid[2])

    with mock.patch.multiple(builder, set_grid_dim=begin, set_grid_idx=place):
        yield
