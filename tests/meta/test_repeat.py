"""The claim ``repeat``: it passes where a call always gives the same bits, and sees the one call that does not."""

from __future__ import annotations

import dataclasses

import torch

from verify import subjects
from verify.claims import repeat
from verify.claims.outcome import Budget
from verify.mutants.base import Wrapped
from verify.plain import SUBJECT
from verify.subject import Subject


def planted(change) -> Subject:
    """Plain torch whose n-th result is ``change(n, result)``."""
    part, calls = SUBJECT.linear, []

    def run(inputs, mode, divisor=1.0):
        calls.append(1)
        return change(len(calls), part.run(inputs, mode, divisor))

    return Subject("planted", "cpu", linear=Wrapped(part, run=run))


def one_unit(n: int, result):
    """The seventh call has one element of dB one unit in the last place away, as float atomics would."""
    if n % repeat.TIMES != 7:
        return result
    db = result.db.clone()
    db[-1, -1] = torch.nextafter(db[-1, -1].float(), torch.tensor(float("inf"))).to(db.dtype) + db[-1, -1].abs() / 128
    return dataclasses.replace(result, db=db)


def test_repeat_holds_for_every_part_of_the_reference():
    subject = subjects.built_in("cpu")[0]
    outcome = repeat.run(subject, Budget(cases=9), 0)
    assert outcome.failures == []
    assert outcome.cases == 9
    assert {"cpu", "fp32", "bf16", "fp16"} & outcome.tags


def test_repeat_sees_one_element_of_one_call():
    (told, *_) = repeat.run(planted(one_unit), Budget(cases=1), 0).failures
    assert "call 7 gave other bits of db than the first (1 elements of db)" in told
    assert "LinearCase(" in told


def test_repeat_fills_what_a_call_leaves_unwritten():
    # A kernel that does not write the last row of y: whatever was in memory is there.
    def unwritten(n: int, result):
        y = torch.empty_like(result.y)
        y[:-1] = result.y[:-1]
        y[-1] = n
        return dataclasses.replace(result, y=y)

    assert any("other bits of y" in told for told in repeat.run(planted(unwritten), Budget(cases=2), 0).failures)


def test_repeat_is_no_pass_for_a_constant_result():
    first = []

    def constant(n: int, result):
        first.append(result)
        return first[0]

    told = repeat.run(planted(constant), Budget(cases=1), 0).failures
    assert any(t.startswith("control: another input gives the same bits") for t in told)


def test_repeat_without_parts_is_not_tried():
    outcome = repeat.run(Subject("nothing", "cpu"), Budget(cases=1), 0)
    assert outcome.verdict == "not tried"
    assert outcome.reason
