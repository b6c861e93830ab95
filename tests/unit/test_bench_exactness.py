"""The exactness level on the tiny shape: what it reports, and errors planted in what it is given."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from bench import exactness, workload
from bench.__main__ import app
from bench.shapes import SHAPES, build
from fastlora.errors import InputError
from fastlora.token_sum import TokenSum

ONE = SHAPES["tiny"].cut(1)
# Seven projections, two factors each.
TENSORS = 14


@pytest.fixture(scope="module")
def inputs():
    """x, dY, A and B of a linear."""
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(size, generator=draw) for size in ((96, 24), (40, 24), (96, 40)))
    a, b = torch.randn(4, 24, generator=draw), torch.randn(40, 4, generator=draw)
    return exactness.LinearInputs(x, weight, a, b, None, dy, 4.0, False, 0.0, torch.zeros(96, dtype=torch.int64), 0)


def test_exact_writes_room_and_errors_of_every_tensor(tmp_path):
    path = tmp_path / "exactness.json"
    run = CliRunner().invoke(app, ["exact", "--device", "cpu", "--layers", "1", "--output", str(path)])
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert (result["kind"], result["layers"], len(result["tensors"]), len(result["errors"])) == ("exactness", 1, TENSORS, TENSORS)
    assert result["provenance"]["versions"]["torch"]
    names = [row["tensor"] for row in result["errors"]]
    assert sorted(row["tensor"] for row in result["tensors"]) == names
    assert all(0 < row["share_of_limit"] < 1 and row["headroom_bits"] > 0 and row["chunks"] > 1 for row in result["tensors"])
    # tolerance-rule: nearer float64 than the mean share of one token, so that none was lost or counted twice.
    assert all(0 < row[who] < 1 / result["tokens"] for row in result["errors"] for who in (exactness.OURS, exactness.HALF, exactness.DEFAULT))
    worse = result["summary"]["worse_than"][exactness.HALF]
    assert f"exact gradient at most PEFT's in float32: {TENSORS - len(worse)} of {TENSORS} tensors" in run.output
    assert "worst" in run.output and "median" in run.output


@pytest.mark.parametrize("name", exactness.FACTORS)
def test_summary_names_a_gradient_with_a_chunk_counted_twice(monkeypatch, inputs, name):
    right, place = exactness.exact_gradients, exactness.FACTORS.index(name)

    def planted(of):
        whole = list(right(of))
        again = exactness.LinearInputs(of.x[:16], *(getattr(of, n) for n in ("weight", "a", "b", "bias")), of.dy[:16], *(
            getattr(of, n) for n in ("alpha", "rslora", "dropout")), of.tokens[:16], of.seed)  # fmt: skip
        whole[place] = whole[place] + right(again)[place]
        return tuple(whole)

    before = exactness.errors("proj", inputs)
    monkeypatch.setattr(exactness, "exact_gradients", planted)
    after = exactness.errors("proj", inputs)
    worse = exactness.summary([dict(share_of_limit=0.1, underflow_share=0.0)], after)["worse_than"]
    assert f"proj.{name}" in worse[exactness.HALF] and f"proj.{name}" in worse[exactness.DEFAULT]
    assert after[place][exactness.OURS] > 1000 * before[place][exactness.OURS]
    assert after[1 - place] == before[1 - place]


def test_room_counts_every_chunk_and_every_small_partial():
    of = TokenSum((2, 2))
    of.add_(torch.tensor([[2.0**20, 1.0], [0.0, -1.0]]), 0)
    (once,) = exactness.room([("t", of)])
    of.add_(torch.tensor([[2.0**-35, 1.0], [0.0, -1.0]]), 1)
    (twice,) = exactness.room([("t", of)])
    assert (once["share_of_limit"], once["headroom_bits"], once["underflow_share"]) == (0.125, 3.0, 0.0)
    assert (twice["share_of_limit"], twice["headroom_bits"], twice["underflow_share"]) == (0.25, 2.0, 1 / 6)


def test_capture_gives_what_each_linear_saw():
    model = build(ONE, "cpu", torch.float32)
    rows = workload.short_rows("demo", 260, ONE.vocabulary, 16)
    found = exactness.capture(model, rows, "cpu")
    assert len(found) == TENSORS // 2 and sum(map(len, rows)) > len(rows[0])
    for path, (x, dy) in found.items():
        outer, inner = model.get_submodule(path).weight.shape
        assert x.shape == (sum(map(len, rows)), inner) and dy.shape == (len(x), outer), path
    assert not any(module._forward_hooks for module in model.modules())
    # One product's output is the next one's input: the MLP's gate and up share x, and so do q, k and v.
    assert torch.equal(found["model.layers.0.mlp.gate_proj"][0], found["model.layers.0.mlp.up_proj"][0])


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--shape", "gpt-9"], ["--device", "cpu", "--layers", "3"], ["--layers", "0"]])
def test_exact_refuses_bad_input(tmp_path, arguments):
    run = CliRunner().invoke(app, ["exact", *arguments, "--output", str(tmp_path / "none.json")])
    assert isinstance(run.exception, InputError) and not list(tmp_path.iterdir())
