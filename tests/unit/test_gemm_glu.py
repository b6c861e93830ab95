"""Which products have the gate in their epilogue, and what the kernels are given; where they do not compile, the gate runs by itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.compiler.errors import CompilationError

from fastlora.kernels import gemm_glu, hopper, launch
from tests.unit.h200 import CPU, columns, stand_in

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    yield from stand_in(monkeypatch, gemm_glu.plan)


def planned(rows=8192, inner=4096, features=14336, rank=16, count=2, *, forward=True, dropout=False, dtype=HALF, activation="silu"):
    layout = columns(rank, *[features] * count) if rank else None
    stored = layout.columns if rank else 0
    return gemm_glu.plan(rows, inner, features, stored, layout, activation, forward, dropout, dtype, CPU)


@pytest.mark.parametrize(
    "changed, forward, backward",
    [
        ({}, True, True), (dict(rank=0), True, True), (dict(activation="gelu_tanh"), True, True), (dict(count=1, rank=128), True, True),
        # rank columns of both projections would be a block more
        (dict(rank=64), False, True),
        # so few tokens that tiles are narrow: gate and up are twice as wide
        (dict(rows=128), True, False), (dict(rows=64, features=2048), False, False),
        # another dtype, a gate of no whole tiles, rows that are no multiple of 16 bytes
        (dict(dtype=torch.float32), False, False), (dict(features=14336 + 128), False, False), (dict(inner=4100), False, False),
    ],
)  # fmt: skip
def test_which_products_have_the_gate_in_their_epilogue(changed, forward, backward):
    assert (planned(**changed) is not None) is forward
    assert (planned(**changed | dict(count=1), forward=False) is not None) is backward


def test_other_architectures_have_none(monkeypatch):
    monkeypatch.setattr(launch, "arch_at", lambda device: "sm_100")
    assert planned() is None


@pytest.mark.parametrize("forward", [True, False])
def test_a_kernel_is_given_its_blocks_and_constants(monkeypatch, forward):
    rows, inner, features, layout = 4096, 256, 2048, columns(16, 2048, 2048)
    x, s = torch.zeros(rows, inner, dtype=HALF), torch.zeros(rows, layout.columns, dtype=HALF)
    w = torch.zeros(2 * features, inner, dtype=HALF) if forward else torch.zeros(inner, features, dtype=HALF)
    b = torch.zeros(2 * features, layout.columns, dtype=HALF) if forward else torch.zeros(layout.columns, features, dtype=HALF)
    seen = {}

    def launched(self, *arguments):
        described = [one for one in self._described(arguments) if hasattr(one, "block_shape")]
        rest = [one for one in arguments if isinstance(one, (int, float))]
        seen.update(kernel=self.kernel, blocks=[d.block_shape for d in described], shapes=[d.shape for d in described],
                    rows=rest[0], grid=self.grid, **self.constants)

    monkeypatch.setattr(launch.Launch, "__call__", launched)
    if forward:
        both, hidden = gemm_glu.forward(x, w, s, b, layout, "silu")
    else:
        both, hidden = gemm_glu.backward(x, w, s, b, layout, "silu", torch.zeros(rows, 2 * features, dtype=HALF))
    assert both.shape == (rows, 2 * features) and hidden.shape == (rows, features)
    assert seen["kernel"] is (gemm_glu.gemm_glu_forward_kernel if forward else gemm_glu.gemm_glu_backward_kernel)
    assert (seen["F"], seen["K"], seen["R"], seen["ACTIVATION"], seen["rows"]) == (features, inner, 32, "silu", rows)
    assert seen["grid"] == (128, 1, 1)  # 512 tiles in four turns, or 256 in two
    across = [128, 64] if forward else [64, 256]
    assert seen["blocks"] == [[64, 64], across, [64, 64], across, *[[64, 64]] * (2 if forward else 3)]
    outs = [[rows, 2 * features], [rows, features]] if forward else [[rows, 2 * features]] * 2 + [[rows, features]]
    assert seen["shapes"] == [list(x.shape), list(w.shape), list(s.shape), list(b.shape), *outs]


def test_a_kernel_that_does_not_compile_leaves_the_gate_by_itself(monkeypatch):
    def broken(self, *arguments):
        raise CompilationError("async_load", None, "no such thing")

    monkeypatch.setattr(launch.Launch, "__call__", broken)
    x, w = torch.zeros(4096, 256, dtype=HALF), torch.zeros(4096, 256, dtype=HALF)
    with pytest.warns(UserWarning, match="GEMM with a gate does not compile with this Triton.*the portable kernel runs"):
        assert gemm_glu.forward(x, w, None, None, None, "silu") is None
    assert not hopper.compiles(gemm_glu.NAME) and hopper.compiles("GEMM")
    assert gemm_glu.forward(x, w, None, None, None, "silu") is None


def test_no_rows_are_left_to_the_kernels_that_take_them():
    x, w = torch.zeros(0, 256, dtype=HALF), torch.zeros(4096, 256, dtype=HALF)
    assert gemm_glu.forward(x, w, None, None, None, "silu") is None
