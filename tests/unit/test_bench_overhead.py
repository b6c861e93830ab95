"""The trainer's overhead level on the tiny shape: both times, the same rows in one micro-batch, and refusals."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from bench.__main__ import app


def test_overhead_times_trainer_and_bare_step_on_the_same_rows(tmp_path):
    path = tmp_path / "overhead.json"
    command = ["overhead", "--device", "cpu", "--tokens", "512", "--steps", "4", "--every", "2", "--output", str(path)]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    result = json.loads(path.read_text())
    assert (result["kind"], result["steps"], result["micro_batches"], result["tokens"]) == ("overhead", 4, 1, 512)
    assert result["padded_tokens"] == 512
    assert result["trainer_over_bare"] == result["trainer_ms"] / result["bare"]["median_ms"]
    # the trainer does all that the bare step does: it cannot be faster by more than this machine's noise
    assert result["trainer_over_bare"] > 0.7 and result["control"]["median"] > 0
    assert "in the trainer over" in run.output


def test_overhead_refuses_too_few_tokens(tmp_path):
    run = CliRunner().invoke(app, ["overhead", "--device", "cpu", "--tokens", "8", "--output", str(tmp_path / "x.json")])
    assert run.exit_code != 0
    assert "tokens = 8: allowed is 16 or more" in str(run.exception)
