"""Which S are masked by warpgroups of their own, and what the kernel is given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import launch, masked, project, project_dropout
from tests.unit.h200 import CPU, columns, dropout, launches_without, stand_in

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    yield from stand_in(monkeypatch, project_dropout.plan)


@pytest.mark.parametrize(
    "features, count, rank, served",
    [(4096, 3, 16, True), (4096, 3, 64, True), (4096, 1, 128, True), (4096, 2, 128, False), (4100, 1, 16, False), (64, 1, 16, False)],
)
def test_which_it_serves(features, count, rank, served):
    made = project_dropout.plan(1000, features, columns(rank, *[1024] * count), HALF, CPU)
    assert (made is not None) is served
    if served:
        assert made.grid[0] == 16
        # the rings of x and A and of masked blocks leave room for barriers
        size = made.constants["STAGES"] * (64 + count * made.constants["R"]) * 64 * 2 + masked.SLOTS * 64 * 64 * 2
        assert size < 225 * 1024


@pytest.mark.parametrize("count, rank", [(1, 16), (2, 16), (3, 16), (1, 64), (2, 64), (3, 64), (1, 128)])
def test_a_warpgroup_that_masks_waits_for_every_turn_of_a_place_or_for_none(count, rank):
    # its barrier tells a turn from the one before alone: who left one out would take an older block for the one it waits for
    stages, blocks = project_dropout.constants_of(4096, columns(rank, *[1024] * count), HALF)["STAGES"], 64
    for which in range(masked.WAYS):
        visited = {task // count for task in range(which, blocks * count, masked.WAYS)}
        for place in range(stages):
            turns = [block in visited for block in range(place, blocks, stages)]
            assert all(turns) or not any(turns), (which, place)
        slots = {task % masked.SLOTS for task in range(which, blocks * count, masked.WAYS)}
        assert all(slot % masked.WAYS == which for slot in slots)


def test_it_is_for_dropout_alone(monkeypatch):
    kernels = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *arguments: kernels.append((self.kernel, arguments)))
    layout = columns(16, 1024, 1024)
    x, a = torch.zeros(100, 4096, dtype=HALF), torch.zeros(layout.columns, 4096, dtype=HALF)
    drop = dropout(100, 2)
    project.project(x, a, layout, drop)
    project.project(x, a, layout)
    project.project(torch.zeros(100, 2048, dtype=HALF), torch.zeros(2048, layout.columns, dtype=HALF), layout, transposed=True)
    assert [kernel is project_dropout.project_dropout_kernel for kernel, _ in kernels] == [True, False, False]
    # rows, a seed a projection and one for none, the threshold in the upper half of a word, scale
    assert kernels[0][1][5:] == (100, 5, 6, 0, 6554 << 16, 1.1)


def test_a_kernel_that_does_not_compile_leaves_s_to_the_portable_one(monkeypatch):
    kernels = launches_without(monkeypatch, project_dropout.project_dropout_kernel)
    layout = columns(16, 1024)
    x, a = torch.zeros(100, 4096, dtype=HALF), torch.zeros(16, 4096, dtype=HALF)
    drop = dropout(100, 1)
    with pytest.warns(UserWarning, match="S with dropout does not compile"):
        project.project(x, a, layout, drop)
    project.project(x, a, layout, drop)
    assert kernels == [project_dropout.project_dropout_kernel, project.project_kernel, project.project_kernel]
