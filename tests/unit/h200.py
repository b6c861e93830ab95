"""An H200 for the plans of launches, on a machine without one, and layouts of rank columns to plan for.

A module of tests that imports this is skipped where Triton has no Gluon: the kernels planned here are written in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastlora.kernels import hopper, launch
from fastlora.kernels.columns import Columns

if hopper.MISSING is not None:
    pytest.skip(f"this Triton has no Gluon: {hopper.MISSING}", allow_module_level=True)

CPU = torch.device("cpu")
QKV = (4096, 1024, 1024)


def stand_in(monkeypatch, *plans: Callable) -> Iterator[None]:
    """The body of a fixture: every device is an H200, on which no kernel has failed; ``plans``, kept by their arguments, forget."""
    monkeypatch.setattr(hopper, "_refused", {})
    monkeypatch.setattr(launch, "persistent_programs", lambda device: 132)
    monkeypatch.setattr(launch, "arch_at", lambda device: "sm_90")
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def columns(rank: int, *widths: int) -> Columns:
    """Projections of these output features side by side, all of one rank."""
    return Columns((rank,) * len(widths), tuple(sum(widths[:i]) for i in range(len(widths))), widths, (2.0,) * len(widths))


def dropout(rows: int, count: int) -> launch.Dropout:
    """Of ``count`` projections."""
    return launch.Dropout(6554, 1.1, tuple(range(5, 5 + count)), torch.zeros(rows, dtype=torch.int64))


def launches_without(monkeypatch, broken) -> list:
    """From now on nothing runs: the kernels launched, in order, of which ``broken`` does not compile."""
    kernels = []

    def launched(self, *arguments):
        kernels.append(self.kernel)
        if self.kernel is broken:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    return kernels
