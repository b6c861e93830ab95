"""``python -m verify``: exit codes, the report, and what it says when a subject has no part for a
claim."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from verify import runner
from verify.claims.outcome import Budget, Outcome
from verify.subject import BadSubject, Subject

EMPTY = Subject("nothing", "cpu")


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "verify", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""},
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--claim", "speed"), "--claim: 'speed'; allowed are accuracy, splits, updates"),
        (("--budget", "soon"), "--budget: 'soon'"),
        (("--subject", "verify.plain:NOTHING"), "--subject: 'verify.plain:NOTHING'"),
        (("--cases", "0"), "--cases: 0; allowed is 1 or more"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_verify_refuses_bad_input_in_one_plain_line(tmp_path, arguments, told):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_gives_equal_reports_for_equal_seed_and_cases(tmp_path):
    arguments = (
        "--subject",
        "verify.plain:SUBJECT",
        "--claim",
        "accuracy",
        "--cases",
        "4",
        "--seed",
        "3",
    )
    reports = []
    for name in ("one.json", "two.json"):
        done = command(*arguments, "--output", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / name).read_text())
        for row in report["claims"]:
            row.pop("seconds")
        reports.append(report)
    assert reports[0] == reports[1]
    assert reports[0]["claims"][0]["cases"] == 4
    assert reports[0]["finished"] is True


def test_verify_requires_what_it_is_told(tmp_path):
    arguments = ("--subject", "verify.plain:SUBJECT", "--claim", "accuracy", "--cases", "2")
    done = command(*arguments, "--require", "cuda", cwd=tmp_path)
    assert done.returncode == 1
    assert "not tried on this machine: cuda" in done.stdout


@pytest.mark.parametrize("name", ["accuracy", "splits", "updates"])
def test_claim_without_a_case_is_not_tried(name):
    (outcome,) = runner.run_claims([EMPTY], [name], seconds=1, cases=None, seed=0, after_each=lambda found: None)
    assert outcome.verdict == "not tried"
    assert outcome.reason
    assert runner.missing([name], [outcome]) == [name]


def test_load_subject_refuses_what_is_no_subject():
    with pytest.raises(BadSubject, match="allowed is a verify.subject.Subject"):
        runner.load_subject("verify.plain:PlainLinear")


def test_outcome_fails_on_a_share_above_one_and_on_nan():
    outcome = Outcome("accuracy", "", "s", cases=2)
    outcome.share(1.0, "at the bound")
    assert outcome.verdict == "pass"
    outcome.share(float("nan"), "not a number")
    assert outcome.verdict == "FAIL"


def test_budget_always_allows_the_first_case():
    assert Budget(seconds=0.0).more(0)
    assert not Budget(seconds=0.0).more(1)
    assert [Budget(cases=2).more(i) for i in range(3)] == [True, True, False]
