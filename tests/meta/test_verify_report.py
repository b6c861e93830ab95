"""The report: a stable schema, one page without a network that a browser shows, and what an interrupt leaves."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_verify_command import command

from verify import histogram, page, report
from verify.histogram import Histogram

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    """A short run with planted faults beside it, as one report."""
    folder = tmp_path_factory.mktemp("report")
    done = command("--subject", "verify.plain:SUBJECT", "--claim", "accuracy", "--cases", "3", "--output", "r.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "r.json").read_text())
    from verify.mutants import MUTANTS
    from verify.mutants.table import try_mutant
    from verify.plain import SUBJECT
    from verify.runner import Found
    from verify.sharpness import measure

    kills = [try_mutant(m, SUBJECT, 0, with_rules=True) for m in MUTANTS if m.name in ("scale missing", "rate of 0")]
    planted = report.as_dict({}, Found(kills=kills, sharpness=list(measure(SUBJECT, 0))), True)
    found["mutants"], found["sharpness"] = planted["mutants"], planted["sharpness"]
    found["page"] = (folder / "r.html").read_text()
    return found


def documented(heading: str) -> set[str]:
    """Field names in the table below a heading of docs/verification.md."""
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    part = text.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    return {name for row in re.findall(r"^\| (`.+?`) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_report_has_the_documented_fields(run):
    assert set(run) - {"page"} == documented("verify-report.json")
    assert set(run["claims"][0]) == documented("A claim")
    assert set(run["mutants"][0]) == documented("A planted fault")
    assert set(run["sharpness"][0]) == documented("A row of sharpness")
    assert run["schema"] == report.SCHEMA


def test_page_needs_no_network(run):
    text = page.html(run)
    assert not re.search(r"""(src|@import|url\()\s*=?\s*["']?(https?:)?//""", text)
    assert "<script" not in text
    links = set(re.findall(r'href="([^"]+)"', text))
    assert all(re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", link) for link in links)


def test_page_shows_every_claim_fault_and_figure(run):
    text = page.html(run)
    for name in ("accuracy", "scale missing", "rate of 0", "adapter-hub/adapters#770", "Errors in units of the bound", "Sharpness"):
        assert name in text, name
    assert "<svg" in run["page"]
    assert text.count("<tr>") >= 8


def test_page_escapes_what_it_is_given(run):
    hostile = json.loads(json.dumps({k: v for k, v in run.items() if k != "page"}))
    hostile["claims"][0]["subject"] = "<script>alert(1)</script>"
    hostile["claims"][0]["failures"] = ["<img src=x>"]
    text = page.html(hostile)
    assert "<script>" not in text
    assert "<img" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_opens_in_headless_chromium(run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.html(run), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count("<h2>") == 4
    assert 'id="claims"' in done.stdout
    assert 'id="mutants"' in done.stdout
    assert "scale missing" in done.stdout


# A subject that says when it is in the middle of its cases.
SIGNALLING = """
import dataclasses
import pathlib

from verify.mutants.base import Wrapped
from verify.plain import SUBJECT as PLAIN

calls = []

def run(inputs, mode, divisor=1.0):
    calls.append(1)
    if len(calls) == 60:
        pathlib.Path("in-the-middle").touch()
    return PLAIN.linear.run(inputs, mode, divisor)

SUBJECT = dataclasses.replace(PLAIN, linear=Wrapped(PLAIN.linear, run=run))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_a_readable_report(tmp_path, number):
    (tmp_path / "signalling.py").write_text(SIGNALLING, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "verify", "--subject", "signalling:SUBJECT", "--budget", "10m", "--claim", "accuracy"],
        cwd=tmp_path, env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # where tests run in the background of a shell, SIGINT is ignored, and children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    path = pathlib.Path(tmp_path, "verify-report.json")
    deadline = time.monotonic() + 120
    while not (tmp_path / "in-the-middle").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted; the report holds what was tried"
    left = json.loads(path.read_text())
    assert left["interrupted"] is True
    assert left["finished"] is False
    assert left["claims"][0]["cases"] >= 1
    assert "interrupted in case" in " ".join(left["claims"][0]["notes"])
    assert "accuracy" in out
    assert "interrupted: it holds what was tried" in (tmp_path / "verify-report.html").read_text()


def test_histogram_counts_every_share_once():
    import torch

    counted = Histogram()
    counted.add(torch.tensor([0.0, 1.0, 0.5, 0.75, 2.0, float("nan"), 1e-30, float("inf")]))
    assert counted.exact == 1
    assert counted.total == 8
    assert counted.counts[-1] == 3
    assert counted.counts[-2] == 2  # 0.75 and 1
    assert counted.counts[-3] == 1
    assert counted.counts[0] == 1
    assert len(counted.as_dict()["edges"]) == histogram.BINS
