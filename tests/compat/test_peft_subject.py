"""PEFT as a subject of the harness: where it holds, and that equal bits are not among it."""

from __future__ import annotations

import pytest

from verify import peft_subject, replay, runner

pytest.importorskip("peft", reason="PEFT is not installed")


def outcome(subject, claim: str):
    (found,) = runner.run_claims([subject], [claim], seconds=None, cases=12, seed=0, after_each=lambda found: None)
    return found


@pytest.mark.parametrize("claim", ["accuracy", "splits", "updates"])
def test_peft_holds_what_it_claims(claim):
    found = outcome(peft_subject.SUBJECT, claim)
    assert found.failures == []
    assert found.cases == 12
    assert 0 < found.worst <= 1


def test_peft_has_no_equal_bits_under_another_cut():
    found = outcome(peft_subject.CLAIMING_BITS, "splits")
    assert found.verdict == "FAIL"
    assert not any(failure.startswith("raised") for failure in found.failures)
    assert "differ between cuts of one batch" in found.failures[0]
    assert replay.in_sentence(found.failures[0]) is not None


def test_peft_with_a_planted_fault_fails():
    from verify.mutants import MUTANTS
    from verify.mutants.table import KILLED, try_mutant

    fault = next(m for m in MUTANTS if m.name == "LoRA left out")
    assert try_mutant(fault, peft_subject.SUBJECT, seed=0).verdict == KILLED
