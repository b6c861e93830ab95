"""The claim ``gradients``: slopes by finite differences, linearity in dY, and registered operators under opcheck."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from verify import subjects
from verify.claims import gradients
from verify.claims.outcome import Budget
from verify.mutants.base import Wrapped
from verify.plain import SUBJECT
from verify.subject import Subject


def planted(change) -> Subject:
    part = SUBJECT.linear

    def run(inputs, mode, divisor=1.0):
        return change(part, inputs, part.run(inputs, mode, divisor))

    return Subject("planted", "cpu", linear=Wrapped(part, run=run))


def clipped(part, inputs, result):
    """A gradient clipped inside the backward: right for small dY, and not linear."""
    return dataclasses.replace(result, da=result.da.clamp(-1.0, 1.0))


def one_element(part, inputs, result):
    """One element of one edge."""
    dx = result.dx.clone()
    if dx.numel():
        dx[-1, -1] = 0
    return dataclasses.replace(result, dx=dx)


def unscaled(part, inputs, result):
    """dB of an S without its scale."""
    return dataclasses.replace(result, db=result.db / (inputs.alpha / inputs.rank))


def of_the_base(part, inputs, result):
    """dx of the frozen layer alone."""
    return dataclasses.replace(result, dx=inputs.dy @ inputs.weight)


@pytest.mark.parametrize(
    ("fault", "name"), [(clipped, "da"), (one_element, "dx"), (unscaled, "db"), (of_the_base, "dx")]
)
def test_gradients_sees_a_wrong_backward(fault, name):
    told = gradients.run(planted(fault), Budget(cases=25, stop_at_failure=True), 1).failures
    assert any(
        f"the slope of {name} along" in t or f"give {name} times 4" in t or f"{name} of dY1" in t for t in told
    ), told


def test_gradients_hold_for_the_reference_and_its_operators():
    outcome = gradients.run(subjects.built_in("cpu")[0], Budget(cases=8), 0)
    assert outcome.failures == []
    assert 0 < outcome.worst <= 1
    assert "opcheck: 4 calls of registered operators (mode 'grad')" in outcome.notes


def test_gradients_tell_an_operator_whose_fake_lies():
    library = torch.library.Library("verifytests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    torch.library.register_fake("verifytests::twice", lambda x: x.new_empty(x.shape[0] + 1, *x.shape[1:]), lib=library)
    operators = lambda inputs: [(torch.ops.verifytests.twice.default, (inputs.x,))]  # noqa: E731
    subject = Subject("planted", "cpu", linear=Wrapped(SUBJECT.linear, operators=operators))
    told = gradients.run(subject, Budget(cases=1), 0).failures
    assert any(t.startswith("opcheck of verifytests.twice.default raised") for t in told)


def test_gradients_say_when_nothing_is_registered():
    outcome = gradients.run(SUBJECT, Budget(cases=2), 0)
    assert outcome.verdict == "pass"
    assert "opcheck not tried: the subject registers no operators" in outcome.notes
