"""A step result that goes on in another run: rows kept, replaced and marked; another model or device refused."""

from __future__ import annotations

import json

import pytest
import torch

from bench import evidence, into
from bench.tables import named
from fastlora.errors import InputError

HEAD = {"kind": "step", "shape": "tiny", "layers": 2, "tokens": 256, "rank": 8, "dtype": "float32"}


def result(commit: str, *rows: dict, gpu: str = "NVIDIA H200", **more) -> dict:
    provenance = {"commit": commit, "gpu": gpu, "cpu": "x", "threads": 2, "date": "2026-01-01", "versions": {}}
    return {**HEAD, "provenance": provenance, "rows": list(rows), **more}


def write(tmp_path, found: dict):
    path = tmp_path / "step.json"
    path.write_text(json.dumps(found))
    return path


def test_rows_of_other_systems_are_kept_and_say_their_commit(tmp_path):
    old = {"system": "peft", "time": 1, "commit": "older"}
    path = write(tmp_path, result("before", {"system": "fastlora", "time": 1}, {"system": "fastlora+ckpt", "time": 2}, old,
                                  {"system": "fastlora+r128", "not_timed": "late"}))  # fmt: skip
    now = result("now")
    rows = into.together(
        [{"system": "fastlora", "time": 3}, {"system": "peft", "not_timed": "late"}, {"system": "frozen+liger", "not_timed": "late"}],
        into.earlier(path, now), "now",
    )  # fmt: skip
    assert rows == [
        {"system": "fastlora", "time": 3}, {"system": "fastlora+ckpt", "time": 2, "commit": "before"}, old,
        {"system": "frozen+liger", "not_timed": "late"},
    ]  # fmt: skip
    assert [named(row) for row in rows[:3]] == ["fastlora", "fastlora+ckpt (at before)", "peft (at older)"]


def test_rows_of_the_same_commit_are_not_marked(tmp_path):
    path = write(tmp_path, result("now", {"system": "peft", "time": 1}))
    assert into.together([], into.earlier(path, result("now")), "now") == [{"system": "peft", "time": 1}]


def test_evidence_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch, capsys):
    plan = [{"question": "rank", "system": name, "rank": rank, "rate": 0.1} for rank in (8, 256) for name in ("LoRA", "rsLoRA")]
    monkeypatch.setattr(evidence, "plan_of", lambda size: plan)
    monkeypatch.setattr(evidence, "line", lambda row: f"{row['system']} {row['rank']}")
    made = []
    monkeypatch.setattr(evidence, "run_one", lambda bench, run: made.append(run) or {"done": len(made)})
    base = torch.nn.Linear(2, 2)
    base.dtype = torch.float32
    monkeypatch.setattr(evidence, "Bench", lambda *arguments: type("Bench", (), {"base": base})())

    def run(name, commit, limit, into=None):
        evidence.main("dir", str(tmp_path / name), quick=True, time_limit=limit, device="cpu", commit=commit, into=into and str(tmp_path / into))
        return json.loads((tmp_path / name).read_text())["rows"]

    clock = iter(range(1000))
    monkeypatch.setattr(evidence.time, "monotonic", lambda: float(next(clock)))
    first = run("a.json", "one", 4.0)  # two calls of the clock a run
    assert [("not_run" in row) for row in first] == [False, False, True, True] and len(made) == 2
    second = run("b.json", "two", 100.0, into="a.json")
    assert len(made) == 4 and [row["rank"] for row in made[2:]] == [256, 256]
    assert [row.get("commit") for row in second] == ["one", "one", None, None] and not any("not_run" in row for row in second)
    base.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(InputError, match="parameters is 6 there and 11 now"):
        run("c.json", "three", 100.0, into="b.json")


@pytest.mark.parametrize(("more", "said"), [({"rank": 16}, "rank is 16 there and 8 now"), ({"gpu": "NVIDIA A100"}, "device is A100 there")])
def test_another_size_or_device_is_refused(tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        into.earlier(write(tmp_path, result("before", **more)), result("now"))
    with pytest.raises(InputError, match="no such file"):
        into.earlier(tmp_path / "none.json", result("now"))
