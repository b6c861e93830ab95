"""The suite's clock: turns, repeats, quantiles, the A/A control; and what a result file must say."""

from __future__ import annotations

import json
import time

import pytest

from bench import timing
from bench.provenance import device_label, provenance, result_path, write_result


def sleeper(milliseconds: float):
    """A call whose time does not depend on how busy the machine is."""
    return lambda: time.sleep(milliseconds / 1e3)


def test_interleaved_control_is_one_on_cpu():
    taken = timing.interleaved({"a": sleeper(2)}, "cpu", base="a", samples=9, work_ms=5)
    found = timing.control(taken, "a")
    assert set(taken) == {"a", "a again"}
    assert 0.8 < found.median < 1.25
    assert taken["a"].repeats >= 2
    assert min(taken["a"].samples) >= 2.0
    assert taken["a"].peak_bytes is None


def test_interleaved_finds_a_ratio():
    taken = timing.interleaved({"short": sleeper(3), "long": sleeper(9)}, "cpu", base="short", samples=5, work_ms=1)
    assert 2 < timing.ratio(taken["long"], taken["short"]).median < 4


def test_interleaved_takes_each_once_a_turn_and_each_after_every_other():
    seen = []
    calls = {name: (lambda name=name: seen.append(name) or time.sleep(0.001)) for name in "abc"}
    timing.interleaved(calls, "cpu", samples=15, work_ms=0.5, warm_up=1)
    order = "".join(seen[-45:])
    timing.interleaved(calls, "cpu", samples=15, work_ms=0.5, warm_up=1)
    assert "".join(seen[-45:]) == order, "the same in every run"
    assert all(sorted(order[at : at + 3]) == ["a", "b", "c"] for at in range(0, 45, 3))
    for pair in ("ab", "ac", "ba", "bc", "ca", "cb"):
        assert order.count(pair) >= 4, pair


def test_interleaved_samples_hold_the_work_asked_for():
    taken = timing.interleaved({"a": lambda: None}, "cpu", samples=1, work_ms=2, warm_up=1)
    assert taken["a"].repeats > 1000


@pytest.mark.parametrize("wrong", [{"base": "b"}, {"samples": 0}, {"warm_up": 0}])
def test_interleaved_refuses_bad_arguments(wrong):
    with pytest.raises(ValueError, match="allowed"):
        timing.interleaved({"a": lambda: None}, "cpu", **wrong)


def test_ratio_reports_quantiles_of_turns():
    found = timing.Ratio((0.9, 1.0, 1.1, 1.2, 1.3))
    assert found.median == 1.1
    assert found.holds_one
    assert found.as_dict()["low"] < found.median < found.as_dict()["high"]
    assert not timing.Ratio((1.1, 1.2, 1.3)).holds_one


def test_quantile_is_linear_between_neighbours():
    assert [timing.quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]


def test_launches_are_none_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not timing.launches(lambda: None)


def test_provenance_names_commit_versions_and_device(monkeypatch):
    said = provenance("abc")
    assert said["commit"] == "abc" and said["dirty"] is False
    assert {"python", "torch", "transformers", "triton", "peft", "liger-kernel"} <= set(said["versions"])
    assert {"gpu", "cpu", "date", "dirty", "threads"} <= set(said)
    assert device_label({"gpu": "NVIDIA H100 80GB HBM3"}) == "H100 80GB HBM3"
    assert device_label({"gpu": "NVIDIA GeForce RTX 4090"}) == "RTX 4090"
    path = result_path("step-llama-3.1-8b", {"date": "2026-11-25T00:00:00+00:00", "gpu": "NVIDIA H200"})
    assert path.name == "2026-11-25-h200-step-llama-3.1-8b.json"


def test_write_result_refuses_one_without_provenance(tmp_path):
    with pytest.raises(ValueError, match="provenance"):
        write_result(tmp_path / "r.json", {"kind": "step"})
    write_result(tmp_path / "new" / "r.json", {"kind": "step", "provenance": provenance()})
    assert json.loads((tmp_path / "new" / "r.json").read_text())["kind"] == "step"
