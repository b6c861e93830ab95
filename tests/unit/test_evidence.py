"""bench.evidence on a tiny model, and docs/advice.md against the newest result."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest

from bench import evidence, evidence_page
from tests.unit.tiny_run import save_model

SMALL = dataclasses.replace(evidence.QUICK, steps=2, rank_steps=2, batch=2, held_out=3, ranks=(8, 256))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    bench = evidence.Bench(str(save_model(folder / "model")), SMALL, folder, "cpu")
    kept = [run for run in evidence.plan_of(SMALL) if run["question"] == "what" or run["rank"] == 8]
    return [run | evidence.run_one(bench, run) for run in kept]


def test_runs_begin_from_one_loss_and_train_what_they_say(rows):
    by = {row["system"]: row for row in rows}
    assert set(by) == {evidence.SEVEN, evidence.QV, evidence.FULL, "LoRA", "rsLoRA"}
    assert len({row["held_out_before"] for row in rows}) == 1
    assert all(math.isfinite(row["held_out_after"]) and row["held_out_after"] != row["held_out_before"] for row in rows)
    sizes = [by[name]["trained_parameters"] for name in (evidence.QV, evidence.SEVEN, evidence.FULL)]
    assert sizes == sorted(sizes)
    # with B = 0 the first gradient is that of B alone, which is the scale's size: sqrt 8 apart, a power of two apart from rounding
    ratio = by["rsLoRA"]["grad_norms"][0] / by["LoRA"]["grad_norms"][0]
    assert abs(ratio / 8**0.5 - 1) < 1e-3  # tolerance-rule: fp32 gradients of some thousand terms, 1e-3 is far above their rounding and far below sqrt 8


def test_all_weights_begin_at_the_loss_of_the_trainer(rows):
    full, lora = (next(r for r in rows if r["system"] == name) for name in (evidence.FULL, evidence.SEVEN))
    # B is zero at first, so that both models are the base model; tolerance-rule: two implementations in fp32, sums of some hundred terms
    assert abs(full["losses"][0] - lora["losses"][0]) < 1e-4


def test_plan_puts_every_system_before_second_rates():
    runs = evidence.plan_of(evidence.WHOLE)
    assert [run["system"] for run in runs[:3]] == [evidence.SEVEN, evidence.QV, evidence.FULL]
    assert [run["rank"] for run in runs if run.get("question") == "rank"][::2] == list(evidence.RANKS)


def test_page_is_made_of_the_newest_result():
    made = evidence_page.text_of(evidence_page.newest())
    text = evidence_page.PAGE.read_text(encoding="utf-8")
    assert evidence_page.MARKS.search(text)[0] == f"<!-- bench: evidence -->\n{made}<!-- /bench: evidence -->"


def test_tables_and_figure_show_the_rows(rows, tmp_path):
    more = copy.deepcopy([row for row in rows if row["question"] == "rank"])
    for row in more:
        row["rank"] = 64
    result = {"kind": "evidence", "quick": False, "alpha": 16, "rank": 16, "size": dataclasses.asdict(SMALL), "parameters": 10**6,
              "dtype": "float32", "provenance": {"date": "2026-11-25", "gpu": None, "commit": "0123456789"},
              "rows": [*rows, *more, {"system": "LoRA", "question": "rank", "rank": 256, "rate": 1.0, "not_run": "the time limit"}]}
    text = evidence_page.text_of(("x.json", result))
    assert "| 8 | LoRA | 2 |" in text and "| 64 | rsLoRA | 2 |" in text and "1 runs of the plan fell" in text and "advice.svg" in text
    evidence_page.draw(result, tmp_path / "a.svg")
    evidence_page.draw(result, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
