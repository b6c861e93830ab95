"""Runs that take long: checkpoints by the clock, the best one kept, early stopping, pictures, one run a folder, damage."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal

import pytest
from tiny_run import train, write_rows

from fastlora import checkpoint, due, evaluate, lock, rundir
from fastlora.errors import InputError
from fastlora.evaluate import Evaluation
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig


def adapter_of(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def steps_kept(folder) -> list[int]:
    return sorted(int(p.name.partition("-")[2]) for p in (folder / "checkpoints").glob("step-*"))


def held_out_losses(monkeypatch, losses):
    """Held-out evaluations give these losses, one after the other; the first is before training."""
    left = list(losses)
    monkeypatch.setattr("fastlora.train.evaluate", lambda *_: Evaluation((left.pop(0), 1.0), (1, 1)))


def test_resume_continues_underflow_counts_and_everything_else_in_the_report(tmp_path):
    held = str(write_rows(tmp_path / "held.jsonl", 3, seed=9))
    settings = {"steps": 4, "checkpoint_every": 1, "eval_data": held, "gradient_scale": 2.0**-20}
    train(tmp_path, "whole", **settings)
    train(tmp_path, "a", stop_after=2, **settings)
    train(tmp_path, "a", resume=True, **settings)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "a")]
    assert any(row["underflow"] for row in reports[0]["tensors"])  # else there would be nothing to continue
    timed = ("seconds", "peak_memory_bytes")
    assert [{k: v for k, v in report.items() if k not in timed} for report in reports][0] == {
        k: v for k, v in reports[1].items() if k not in timed}
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_resume_uses_the_checkpoint_before_a_truncated_one_and_says_so(tmp_path, name):
    train(tmp_path, "whole", steps=4)
    train(tmp_path, "a", steps=4, checkpoint_every=1, stop_after=3)
    damaged = tmp_path / "a" / "checkpoints" / "step-00000003" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    _, trainer, printed = train(tmp_path, "a", steps=4, checkpoint_every=1, resume=True)
    assert "checkpoint step-00000003 is damaged" in printed and "the one before it is used" in printed
    assert "resume: after step 2 of 4" in printed
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "whole")
    assert [record["step"] for record in trainer.records] == [1, 2, 3, 4]


def test_the_best_checkpoint_and_the_last_ones_are_kept(tmp_path, monkeypatch):
    held = str(write_rows(tmp_path / "held.jsonl", 2, seed=9))
    held_out_losses(monkeypatch, [9, 8, 5, 6, 7, 6, 7])
    _, _, printed = train(tmp_path, "a", steps=6, checkpoint_every=1, keep_checkpoints=2, eval_data=held, eval_every=1)
    assert steps_kept(tmp_path / "a") == [2, 5, 6]
    assert "lowest held-out loss: 3.0000 after step 2; that adapter is in" in printed
    best = checkpoint.newest(tmp_path / "a" / "checkpoints", at_most=2)[0]
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "a" / rundir.BEST / "adapter_model.safetensors")
    assert stored.keys() == best.adapter.keys()
    assert all((stored[name] == best.adapter[name]).all() for name in stored)
    assert adapter_of(tmp_path / "a" / rundir.BEST) != adapter_of(tmp_path / "a")


def test_a_new_best_is_checkpointed_though_none_is_due(tmp_path, monkeypatch):
    held = str(write_rows(tmp_path / "held.jsonl", 2, seed=9))
    held_out_losses(monkeypatch, [9, 8, 8.5, 7, 7.5])
    train(tmp_path, "a", steps=4, checkpoint_every=0, keep_checkpoints=1, eval_data=held, eval_every=1)
    assert steps_kept(tmp_path / "a") == [3, 4]


def test_early_stopping_ends_saves_and_stays_ended(tmp_path, monkeypatch):
    held = str(write_rows(tmp_path / "held.jsonl", 2, seed=9))
    settings = {"steps": 8, "eval_data": held, "eval_every": 1, "early_stopping_patience": 2}
    held_out_losses(monkeypatch, [9, 5, 6, 5, 4])
    result, _, printed = train(tmp_path, "a", **settings)
    assert result.steps == 3 and result.report["stopped_early"]
    assert "ended early after step 3 of 8: 2 evaluations brought no lower held-out loss" in printed
    assert steps_kept(tmp_path / "a") == [1, 3] and "--resume" not in printed
    again, *_ = train(tmp_path, "a", resume=True, **settings)
    assert again.steps == 3
    held_out_losses(monkeypatch, [6, 6, 6, 6, 6])
    further, *_ = train(tmp_path, "a", resume=True, **(settings | {"early_stopping_patience": 0}))
    assert further.steps == 8 and not further.report["stopped_early"]


def test_early_stopping_needs_held_out_data():
    with pytest.raises(InputError, match="early_stopping_patience = 2: needs eval_data"):
        TrainConfig(data="a", output="b", early_stopping_patience=2)


def test_out_of_patience_counts_evaluations_since_the_lowest():
    course = [(0, 3.0, 0.1), (5, 2.0, 0.1), (10, 2.0, 0.1), (15, 2.5, 0.1)]
    assert [evaluate.out_of_patience(course, n) for n in (0, 1, 2, 3)] == [False, True, True, False]
    assert not evaluate.out_of_patience([], 1)
    assert evaluate.best_point(course)[0] == 5


def test_due_keeps_the_clock():
    now = [100.0]
    config = TrainConfig(data="a", output="b", checkpoint_every=10, checkpoint_minutes=2, eval_every=4)
    keeper = due.Due(config, 25, lambda: now[0])
    assert [keeper.checkpoint(n) for n in (9, 10, 11)] == [False, True, False]
    now[0] += 120
    assert keeper.checkpoint(11) and not keeper.checkpoint(25)
    keeper.saved()
    assert not keeper.checkpoint(12)
    assert [n for n in range(1, 26) if keeper.evaluation(n)] == [4, 8, 12, 16, 20, 24, 25]
    drawn = []

    def slow():
        drawn.append(now[0])
        now[0] += 3

    keeper.picture(slow)  # 120 s after the start
    now[0] += due.PICTURE_PART * 3 - 1
    keeper.picture(slow)
    assert len(drawn) == 1
    now[0] += 1
    keeper.picture(slow)
    assert len(drawn) == 2


def test_the_picture_is_drawn_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(due, "PICTURE_SECONDS", 0.0)
    monkeypatch.setattr(due, "PICTURE_PART", 0)
    seen, original = [], Trainer._advance

    def advance(self):
        original(self)
        picture = tmp_path / "a" / rundir.PICTURE
        seen.append(hashlib.md5(picture.read_bytes()).hexdigest())

    monkeypatch.setattr(Trainer, "_advance", advance)
    train(tmp_path, "a", steps=3)
    assert len(set(seen)) == 3
    assert (tmp_path / "a" / rundir.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_in_a_folder_at_work_is_refused(tmp_path):
    train(tmp_path, "a", steps=1)
    files = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with lock.held(tmp_path / "a") as left:
        assert left is None
        for more in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match=rf"another run is at work there \(process {os.getpid()} on .*, since "):
                train(tmp_path, "a", steps=1, **more)
        with pytest.raises(InputError, match="another run is at work"), lock.held(tmp_path / "a"):
            pass
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == files
    train(tmp_path, "a", steps=1, overwrite=True)


def _hold(folder, ready) -> None:
    with lock.held(folder):
        ready.set()
        ready.wait(60)
        os.kill(os.getpid(), 9)


def test_the_lock_of_a_dead_process_is_taken_over_and_said(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "a", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match=f"process {process.pid} on"):
        lock.check(tmp_path / "a")
    process.kill()
    process.join()
    _, _, printed = train(tmp_path, "a", steps=1)
    assert f"lock: process {process.pid} on " in printed and "taken over" in printed
    assert not (tmp_path / "a" / lock.NAME).exists()


def test_sigterm_finishes_the_step_saves_and_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    train(tmp_path, "whole", steps=3)
    original = Trainer.sums

    def sums(self, rows, ids, cuts, step):
        if step == 2 and hasattr(self, "progress"):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, rows, ids, cuts, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "sums", sums)
        stopped, _, printed = train(tmp_path, "a", steps=3)
    assert (stopped.steps, stopped.signal) == (2, signal.SIGTERM)
    assert re.search("go on with: .*fastlora train --output", printed) and steps_kept(tmp_path / "a") == [2]
    train(tmp_path, "a", steps=3, resume=True)
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "whole")
