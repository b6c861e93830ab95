"""The bench's kernel paths where no GPU is: every case is made, verified and called in Triton's interpreter, at tiny sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import block_cases, check, kernel_cases, nonexact, systems
from bench.cases import Size
from bench.shapes import SHAPES
from fastlora.ops import backend, decoder_layer, linear_cross_entropy

pytestmark = pytest.mark.interpreter

PRODUCT = Size("p", 40, 48, 80, rank=4)
ROW = Size("r", 20, 48, 40, heads=2, key_heads=1, head_dim=32)
SIZES = {
    "product": PRODUCT, "low": PRODUCT, "linear": PRODUCT, "small": PRODUCT, "row": ROW, "attention": dataclasses.replace(ROW, name="2x64", tokens=128),
    "loss": Size("x", 40, 32, 100), "layer": dataclasses.replace(ROW, tokens=40, inner=32, outer=48, rank=4),
}  # fmt: skip
CASES = [(m, name, row[1]) for m, rows in ((kernel_cases, kernel_cases.KERNELS), (block_cases, block_cases.BLOCKS)) for name, row in rows.items()]


@pytest.mark.parametrize(("module", "name", "sizes"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_make_gives_cases_whose_kernels_verify_and_run(monkeypatch, module, name, sizes):
    monkeypatch.setattr(check, "LINEAR_ROWS", 24)
    monkeypatch.setattr(block_cases, "CHECK_ROWS", 24)
    with backend.use("triton"):
        case = module.make(name, SIZES[sizes], "cpu", torch.float32)
        found = case.check()
        assert found.passed, found.reason
        for system, call in case.calls.items():
            if system not in ("compile", "cudnn"):
                call()
        case.close()


@pytest.mark.slow
def test_check_model_runs_fused_layers(monkeypatch):
    monkeypatch.setattr(check, "LENGTHS", (70, 33))
    shape = dataclasses.replace(SHAPES["tiny"], hidden=32, intermediate=48, heads=2, key_heads=1, vocabulary=64)
    with backend.use("triton"):
        found = check.model(systems.parse("fastlora+align128", tokens=256, rank=4), shape, "cpu", torch.float32)
    assert found.passed, found.reason
    assert found.notes == ("2 decoder layers run as fused kernels", "two cuts of the documents: the same bits")


@pytest.fixture
def small():
    return dataclasses.replace(SHAPES["tiny"], hidden=32, intermediate=48, heads=2, key_heads=1, vocabulary=64, layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True], ids=["right", "a document sees the one before"])
def test_check_model_judges_the_non_exact_configuration(monkeypatch, small, fault):
    monkeypatch.setattr(nonexact, "LENGTHS", (40, 40))
    names = decoder_layer.attention_forward, decoder_layer.attention_backward, linear_cross_entropy._tile_triton
    if fault:
        monkeypatch.setattr(nonexact, "documents", lambda stream: 1)
    with backend.use("triton"):
        found = check.model(systems.parse("fastlora+nonexact+align64", tokens=128, rank=4), small, "cpu", torch.float32)
    assert found.passed != fault, found.reason
    assert found.notes == ("1 decoder layers run as fused kernels",)  # nothing is said about bits
    assert names == (decoder_layer.attention_forward, decoder_layer.attention_backward, linear_cross_entropy._tile_triton)
