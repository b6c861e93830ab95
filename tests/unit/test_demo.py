"""The demo from end to end, with a tiny random model in place of the real one."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny_run import save_model

from fastlora.demo import run_demo
from fastlora.errors import InputError


def test_run_demo_shows_examples_losses_and_cuts(tmp_path):
    model, out = save_model(tmp_path / "model", layers=1), io.StringIO()
    console = Console(file=out, width=160)
    found = run_demo(str(tmp_path / "demo"), model=str(model), steps=2, device="cpu", console=console)
    printed = out.getvalue()
    for part in ("held out", "real docstring", "paired standard errors over 64 functions", "What training changed",
                 "MD5 of the adapter after step 2", "fastlora generate", "exact sums: the same bytes for both cuts"):
        assert part in printed
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == json.loads(json.dumps(found))
    exact = [row for row in found["cuts"] if row["sums"] == "exact"]
    assert len({row["digest"] for row in exact}) == 1
    assert exact[0]["micro_batches"] != exact[1]["micro_batches"]
    assert len(found["examples"]) == 3
    with pytest.raises(InputError, match="earlier demo"):
        run_demo(str(tmp_path / "demo"), model=str(model), steps=2, device="cpu", console=console)
