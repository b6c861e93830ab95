"""The bench's non-exact configuration with cuDNN and cuBLAS, and the error of the exact gradient in 16 bits."""

from __future__ import annotations

import pytest
import torch

from bench import check, exactness, nonexact, systems, workload
from bench.shapes import SHAPES, build

pytestmark = pytest.mark.gpu

SHAPE = SHAPES["llama-3.2-1b"]


@pytest.mark.parametrize("part", ["", "+ckpt"])
def test_check_model_passes_the_non_exact_configuration(part):
    found = check.model(systems.parse(f"fastlora+nonexact{part}"), SHAPE, "cuda", torch.bfloat16)
    assert found.passed, found.reason
    assert found.notes == ("2 decoder layers run as fused kernels",)


def test_check_model_sees_a_document_that_attends_to_the_one_before(monkeypatch):
    monkeypatch.setattr(nonexact, "documents", lambda stream: 1)
    assert not check.model(systems.parse("fastlora+nonexact"), SHAPE, "cuda", torch.bfloat16).passed


def test_errors_of_exact_gradients_are_at_most_those_of_peft_in_16_bits():
    shape = SHAPES["smollm2-135m"].cut(1)
    rows = workload.short_rows("library", 2048, shape.vocabulary, 64)
    found = exactness.of_linears(build(shape, "cuda", torch.bfloat16), rows, 16, "cuda")
    assert [row for row in found if not row[exactness.OURS] <= row[exactness.HALF]] == []
