"""``verify.replay``: a case from its text, the claim on it alone, and a smaller one that still fails."""

from __future__ import annotations

import pytest

from verify import replay
from verify.mutants import MUTANTS
from verify.plain import CLAIMING_BITS, SUBJECT
from verify.strategies import LinearCase, ordered
from verify.subject import BadSubject

NAMES = ("fp32", "bf16")


@pytest.mark.parametrize("kind", ["linear", "split", "rows", "train", "optimizer"])
def test_parse_gives_back_every_case_that_prints(kind):
    for case in ordered(kind, NAMES, 0)[:30]:
        assert replay.parse(repr(case)) == case
        assert replay.in_sentence(f"y[0, 1] is 3 (not 4): 2 of its bound; someone, grad, {case!r}") == case


@pytest.mark.parametrize(
    "text", ["", "LinearCase(", "LinearCase(m=1)", "Hyper()", "print(1)", "LinearCase(m=__import__('os'))", "[1, 2]"]
)
def test_parse_refuses_what_is_no_case(text):
    with pytest.raises(BadSubject, match="--case"):
        replay.parse(text)


def test_in_sentence_is_none_without_a_case():
    assert replay.in_sentence("control: float sums never differed (linear): these cuts prove nothing") is None


def test_shrunk_still_fails_and_is_simpler():
    faulty = next(m for m in MUTANTS if m.name == "LoRA left out of y").plant(SUBJECT)
    case = next(c for c in ordered("linear", NAMES, 0) if c.m > 50 and replay.replay(faulty, "accuracy", c).failures)
    small = replay.shrunk(faulty, "accuracy", case, seconds=60)
    assert replay.replay(faulty, "accuracy", small).failures
    assert isinstance(small, LinearCase)
    assert small.m * small.k * small.n * small.r * 100 < case.m * case.k * case.n * case.r
    assert not replay.replay(SUBJECT, "accuracy", small).failures


def test_shrunk_leaves_a_case_that_does_not_fail_alone():
    case = ordered("linear", NAMES, 0)[3]
    assert replay.shrunk(SUBJECT, "accuracy", case, seconds=5) is case


def test_replay_runs_the_one_case():
    case = ordered("split", NAMES, 0)[0]
    outcome = replay.replay(CLAIMING_BITS, "splits", case)
    assert outcome.cases == 1
    assert all(repr(case) in failure for failure in outcome.failures)
    with pytest.raises(BadSubject, match="RowsCase needs the part 'operations'"):
        replay.replay(SUBJECT, "invariance", ordered("rows", NAMES, 0)[0])
