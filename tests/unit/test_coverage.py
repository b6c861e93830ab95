"""coverage: a row for every linear layer, with backend and reason."""

from __future__ import annotations

import pytest

from fastlora.config import LoraConfig
from fastlora.coverage import coverage, coverage_lines
from fastlora.errors import InputError
from fastlora.inject import inject
from fastlora.merge import merge
from fastlora.ops import backend
from tests.models import tiny_model


def test_coverage_names_backend_and_reason_of_every_linear():
    model = inject(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    rows = {row.path: row for row in coverage(model)}
    assert len(rows) == 15
    row = rows["model.layers.0.self_attn.q_proj"]
    assert (row.projection, row.backend) == ("q_proj", "reference") and "cpu" in row.reason
    assert rows["model.layers.0.self_attn.k_proj"].backend == "eager"
    assert rows["lm_head"].backend == "eager"


def test_coverage_says_merged():
    rows = coverage(merge(inject(tiny_model(), LoraConfig(r=2))))
    assert {row.backend for row in rows} == {"eager"}
    assert any("merged" in row.reason for row in rows)


def test_coverage_strict_refuses_anything_slow():
    model = inject(tiny_model(), LoraConfig(r=2))
    with pytest.raises(InputError, match="q_proj: reference .*cpu.* and 11 more"):
        coverage(model, strict=True)
    with pytest.raises(InputError, match="no adapters"):
        coverage(tiny_model(), strict=True)
    with backend.use("triton"):
        assert sum(row.backend == "triton" for row in coverage(model, strict=True)) == 14


def test_coverage_lines_count_projections():
    lines = coverage_lines(inject(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])))
    assert any(line.startswith("reference: q_proj x2 (") for line in lines)
    assert any(line.startswith("eager: k_proj x2") for line in lines)
