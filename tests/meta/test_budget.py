"""Budgets end on time, seeds never cry wolf, and programs of the interpreter run in a shuffled order."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from verify import replay, runner, seeds, subjects
from verify.budget import Timed, seconds_of
from verify.claims.outcome import Outcome
from verify.plain import SUBJECT
from verify.runner import Found
from verify.subject import BadSubject


def test_timed_stops_before_a_case_of_which_less_than_half_would_fit(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    budget, done = Timed(seconds=10.0, begun=0.0), 0
    while budget.more(done):
        clock[0] += 4.0
        done += 1
    # After 8 s half of a case of 4 s does not fit into the 2 s left.
    assert (done, clock[0]) == (2, 8.0)


def test_timed_always_allows_the_first_case_and_counts_cases():
    assert Timed(seconds=0.0).more(0)
    assert [Timed(cases=2).more(i) for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("2m", 120), ("90", 90), ("1.5h", 5400)])
def test_seconds_of_reads_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-1s", "soon", "5d"])
def test_seconds_of_refuses_what_is_no_time(text):
    with pytest.raises(BadSubject, match="--budget"):
        seconds_of(text)


def test_run_ends_within_a_tenth_of_its_budget(monkeypatch):
    # the process's own seconds: what else a machine does would otherwise be in the last case
    monkeypatch.setattr(time, "monotonic", time.process_time)
    begun = time.monotonic()
    outcomes = runner.run_claims(
        [SUBJECT], ["accuracy", "updates"], seconds=10.0, cases=None, seed=0, after_each=lambda found: None
    )
    assert abs(time.monotonic() - begun - 10.0) <= 1.0
    assert [o.claim for o in outcomes] == ["accuracy", "updates"]
    assert all(o.verdict == "pass" for o in outcomes)


def test_twenty_seeds_raise_no_false_alarm():
    # The claim that draws the most; the published run of 200 seeds has them all.
    found = Found()
    seeds.run(subjects.built_in("cpu")[:1], ["accuracy"], range(100, 120), 3, found, lambda: None)
    (outcome,) = found.outcomes
    assert outcome.failures == []
    assert outcome.cases == 60
    assert outcome.notes == ["seeds tried: 20, the last is 119; 3 cases each"]


def test_replay_says_when_a_claim_takes_no_such_case():
    case = replay.parse("OptimizerCase(hyper=Hyper(lr=0.001), size=1.0, steps=1, zero_b=False, seed=0)")
    with pytest.raises(BadSubject, match="needs the part 'optimizer'"):
        replay.replay(replace(SUBJECT, optimizer=None), "updates", case)
    assert replay.replay(SUBJECT, "updates", case).verdict == "pass"


@pytest.mark.parametrize("lost", [None, "CUDA error: an illegal memory access was encountered"])
def test_what_follows_a_lost_gpu_is_not_tried_and_says_why(monkeypatch, lost):
    answers = iter([None, lost, None, None])
    monkeypatch.setattr(runner.context, "broken", lambda: next(answers, None))
    names = ["updates", "guards", "accuracy"]
    for name in names:
        monkeypatch.setattr(runner.CLAIMS[name], "run", lambda subject, budget, seed, name=name: Outcome(name, "", subject.name, cases=1))
    seen = []
    outcomes = runner.run_claims(
        [SUBJECT], names, seconds=None, cases=1, seed=0, after_each=lambda found: seen.append(len(found.outcomes))
    )
    # accuracy is tried last and reported first
    assert {outcome.claim: outcome.verdict for outcome in outcomes} == {
        "updates": "pass", "guards": "pass", "accuracy": "not tried" if lost else "pass",
    }  # fmt: skip
    assert outcomes[0].reason == (f"the GPU is unusable since guards on {SUBJECT.name}: {lost}" if lost else "")
    assert seen[-1] == 3
