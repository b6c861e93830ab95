"""The log's lines, the progress line, TensorBoard scalars and the picture of the loss."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fastlora import plot
from fastlora.log import Progress, RunLog, TensorBoard


def test_run_log_keeps_whole_lines_up_to_a_step(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 6):
        log.append({"step": step, "loss": step / 3})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 6, "lo')  # what a crash leaves
    assert [r["step"] for r in log.read()] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in log.keep(3)] == [1, 2, 3]
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1 / 3, 2 / 3, 1.0]


def test_run_log_refuses_nan(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    with pytest.raises(ValueError):
        log.append({"step": 1, "loss": float("nan")})
    assert not log.path.exists()


def test_run_log_cuts_back_on_a_full_disk():
    from fastlora.errors import TrainingError

    with pytest.raises((TrainingError, OSError)):
        RunLog("/dev/full").append({"step": 1})


def test_progress_says_loss_rate_fill_and_memory():
    out = io.StringIO()
    console = Console(file=out, width=200)
    with Progress(console, total=2) as progress:
        progress.step(1, 2.5, 1e-4, tokens=90, padded=100, memory=2**30)
        progress.step(2, 2.25, 5e-5, tokens=90, padded=100, memory=2**30)
    text = out.getvalue()
    for part in ("step 2/2", "loss 2.2500", "tokens/s", "fill 0.90", "1.0 GiB", "5.00e-05"):
        assert part in text


def test_progress_bar_on_a_terminal():
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=160), total=2) as progress:
        progress.step(2, 2.25, 5e-5, tokens=90, padded=100, memory=2**30)
    assert "2/2" in out.getvalue()
    assert "loss 2.2500" in out.getvalue()


def test_run_curves_are_a_png(tmp_path, monkeypatch):
    records = [{"step": s, "loss": 3 / s, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 9.0} for s in range(1, 30)]
    plot.run_curves(tmp_path / "loss.png", records, [(0, 3.0, 0.1), (29, 2.0, 0.1)])
    plot.run_curves(tmp_path / "one.png", records[:1])
    plot.run_curves(tmp_path / "none.png", [])
    whole = (tmp_path / "loss.png").read_bytes()
    monkeypatch.setattr(plot, "MOST_POINTS", 5)  # a long run is thinned
    plot.run_curves(tmp_path / "loss.png", records, [(0, 3.0, 0.1), (29, 2.0, 0.1)])
    assert (tmp_path / "loss.png").read_bytes() != whole
    for name in ("loss.png", "one.png", "none.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tensorboard_writes_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    board.step({"step": 1, "loss": 2.0, "eval_loss": None, "learning_rate": 1e-4})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.0
