"""Timing by graph replay, all but the capture itself: the check of a replay, what is told instead of a time, the ratios."""

from __future__ import annotations

import pytest
import torch

from bench import block_cases, graphs, level, timing


def warm(call):
    return [t.detach().clone() for t in call()]


def recorder(call, runs=lambda again: again()):
    """Stands in for a capture: memory that stays, and a replay that runs the call and writes it there."""
    written = [t.detach().clone() for t in call()]

    def again():
        for kept, new in zip(written, call()):
            kept.copy_(new.detach())

    return (lambda: runs(again)), written


@pytest.fixture
def case():
    made = block_cases.make("small-linear", block_cases.SIZES["cpu"]["small"][0], "cpu", torch.float32)
    yield made
    made.close()


def test_small_linear_returns_what_its_forward_and_backward_wrote(case):
    for name in ("fastlora", "fastlora-float", "peft"):
        y, dx = case.calls[name]()
        assert y.shape == (64, 256) and dx.shape == (64, 192) and bool(dx.any())
        again = case.calls[name]()
        assert torch.equal(y, again[0]) and torch.equal(dx, again[1])  # no gradient is added to the last one


def test_captured_replays_what_the_call_wrote(case):
    ran = []
    call = case.calls["fastlora"]
    replay = graphs.captured(call, warm=warm, recorder=lambda c: recorder(c, lambda again: (ran.append(1), again())))
    replay()
    assert len(ran) == 2  # the check's and this one


@pytest.mark.parametrize("index", [0, 1])
def test_captured_refuses_a_replay_that_leaves_something_unwritten(case, index):
    def lame(call):
        replay, written = recorder(call)

        def replayed():
            replay()
            written[index].fill_(float("nan"))

        return replayed, written

    with pytest.raises(RuntimeError, match=f"tensor {index} is off"):
        graphs.captured(case.calls["peft"], warm=warm, recorder=lame)
    with pytest.raises(RuntimeError, match="tensor 0 is off"):
        graphs.captured(case.calls["peft"], warm=warm, recorder=lambda call: (lambda: None, recorder(call)[1]))
    with pytest.raises(RuntimeError, match="returns no tensors"):
        graphs.captured(lambda: (), warm=warm, recorder=recorder)


def test_compare_says_why_nothing_was_timed(case):
    assert graphs.compare(case.calls, "peft", "fastlora", "cpu") == {"not_timed": "not tried: no GPU"}

    def capture(call):
        if call is case.calls["fastlora"]:
            raise RuntimeError("operation not\npermitted when stream is capturing")
        return call

    found = graphs.compare(case.calls, "peft", "fastlora", "cuda", capture=capture)
    assert found == {"not_timed": "fastlora: operation not permitted when stream is capturing"}


def test_ratios_are_of_replays_with_a_control():
    taken = {n: timing.Timing(s, 4) for n, s in (("peft", (2.0, 2.0)), ("peft again", (2.0, 2.0)), ("fastlora", (1.0, 1.5)))}
    found = graphs.ratios(taken, "peft", "fastlora")
    assert found["over_baseline"]["median"] == 0.625 and found["time"]["median_ms"] == 1.25
    assert found["control"]["holds_one"] and found["baseline_time"]["repeats"] == 4


def test_line_tells_the_graphs_ratio_or_why_there_is_none():
    ratio, control = {"median": 0.5, "low": 0.4, "high": 0.6}, {"median": 1.01, "holds_one": True}
    row = {"case": "c", "system": "s", "baseline": "peft", "time": {"median_ms": 1.0}, "over_baseline": ratio, "control": control}
    assert level.line(row | {"graph": {"over_baseline": ratio | {"median": 0.25}, "control": control}}).endswith("graph 0.250 x (A/A 1.010)")
    assert level.line(row | {"graph": {"not_timed": graphs.NO_GPU}}).endswith("graph not tried: no GPU")


def test_small_linear_has_every_size_of_the_target():
    assert {(s.inner, s.tokens) for s in block_cases.SIZES["cuda"]["small"]} == {
        (k, m) for k in (576, 2048) for m in (128, 512, 1024, 2048, 4096)
    }
    systems = {system for name, _, system in block_cases.all_cases("cuda") if name == "small-linear"}
    assert systems == {"fastlora", "fastlora-float"}
