"""Checkpoints are written beside the next steps, and hold the step they were taken after."""

from __future__ import annotations

import threading

import pytest
import torch

from fastlora import checkpoint
from fastlora.errors import TrainingError
from tests.unit.tiny_run import train


@pytest.fixture
def slow(monkeypatch):
    """The writer waits until the main thread says so; yields (event, names of the writing threads)."""
    go, threads, write = threading.Event(), [], checkpoint.write

    def waiting(*arguments):
        threads.append(threading.current_thread().name)
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", waiting)
    return go, threads


def test_a_checkpoint_that_is_written_late_holds_its_own_step(tmp_path, slow, monkeypatch):
    from fastlora.train import Trainer

    go, threads = slow
    advance, seen = Trainer._advance, []

    def step(self):
        advance(self)
        seen.append(sorted(p.name for p in (tmp_path / "a" / "checkpoints").glob("step-*")))
        if self.done == 1:  # the second save waits for the first
            threading.Timer(0.2, go.set).start()

    monkeypatch.setattr(Trainer, "_advance", step)
    train(tmp_path, "a", steps=3, checkpoint_every=1, keep_checkpoints=3)
    assert seen[0] == []  # the first was not on disk yet when the second step ran
    assert all(name.startswith("fastlora-saver") for name in threads)
    for done in (1, 2):
        train(tmp_path, f"to-{done}", steps=3, stop_after=done)
        late, own = (checkpoint.newest(tmp_path / name / "checkpoints", done)[0] for name in ("a", f"to-{done}"))
        assert late.step == own.step == done
        assert late.adapter.keys() == own.adapter.keys()
        for name, tensor in own.adapter.items():
            assert torch.equal(tensor, late.adapter[name])
        for index, state in own.optimizer["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(late.optimizer["state"][index][key]))


def test_a_save_that_failed_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    def full(*arguments):
        raise TrainingError("disk full")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(TrainingError, match="disk full"):
        train(tmp_path, "a", steps=50, checkpoint_every=1)
    log = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert 1 <= len(log) <= 3
