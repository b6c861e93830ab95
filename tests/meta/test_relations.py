"""Relations between calls of a LoRA linear: they hold for right ones, and see faults of shape and scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from verify import relations
from verify.claims import accuracy
from verify.claims.outcome import Budget
from verify.mutants.base import Wrapped
from verify.plain import SUBJECT, PlainLinear
from verify.strategies import LinearCase
from verify.subject import Subject

CASE = LinearCase(
    m=33, k=24, n=20, r=6, dtype="fp32", alpha=12.0, rslora=False, bias=True, dropout=0.0, values="normal", size=1.0,
    layout="plain", seed=4,
)  # fmt: skip


def found(part, case: LinearCase = CASE) -> dict[str, list]:
    """The findings of every relation that fails."""
    inputs, wrong = case.inputs(), {}
    for name, (failed, share, told) in relations.related(part, inputs, "grad", part.run(inputs, "grad")):
        if failed or (failed is None and not share <= 1):
            wrong.setdefault(name, []).append(told)
    return wrong


@pytest.mark.parametrize("values", ["normal", "grid", "zeros", "heavy"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_related_holds_for_plain_maths(values, dtype):
    assert found(PlainLinear(), dataclasses.replace(CASE, values=values, dtype=dtype)) == {}


def planted(change):
    """A linear that gets a changed call."""
    part = PlainLinear()
    return Wrapped(part, run=lambda inputs, mode, divisor=1.0: change(part, inputs))


def test_related_sees_a_scale_that_knows_the_rank_alone():
    def own_alpha(part, inputs):
        return part.run(dataclasses.replace(inputs, alpha=16.0), "grad")

    assert "alpha times 8 and B divided by 8" in found(planted(own_alpha))


def test_related_sees_rank_padding_that_is_not_zero():
    def padded(part, inputs):
        # Ranks are padded to 8 with a copy of the last row and column.
        more = -inputs.rank % 8
        a = torch.cat([inputs.a, *[inputs.a[-1:]] * more])
        b = torch.cat([inputs.b, *[inputs.b[:, -1:]] * more], 1)
        wide = part.run(dataclasses.replace(inputs, a=a, b=b, alpha=inputs.alpha / inputs.rank * len(a)), "grad")
        return dataclasses.replace(wide, da=wide.da[: inputs.rank], db=wide.db[:, : inputs.rank])

    wrong = found(planted(padded))
    assert {"a rank split in two", "rank padded with zeros"} & wrong.keys()


def test_related_sees_rows_that_know_their_place_and_columns_their_neighbours():
    def by_place(part, inputs):
        result = part.run(inputs, "grad")
        y = result.y.clone()
        y[0] *= 1.01
        return dataclasses.replace(result, y=y)

    def last_column(part, inputs):
        result = part.run(inputs, "grad")
        y = result.y.clone()
        y[:, -1] += y[:, 0]
        return dataclasses.replace(result, y=y)

    assert "tokens permuted" in found(planted(by_place))
    assert "projections joined" in found(planted(last_column))


def test_accuracy_tells_a_relation_without_its_oracle(monkeypatch):
    monkeypatch.setattr(accuracy, "_one", lambda *_: False)
    part = planted(lambda part, inputs: part.run(dataclasses.replace(inputs, alpha=16.0), "grad"))
    told = accuracy.run(Subject("planted", "cpu", linear=part), Budget(cases=9), 0).failures
    assert any(t.startswith("alpha times 8 and B divided by 8: ") for t in told)
    outcome = accuracy.run(SUBJECT, Budget(cases=9), 2)
    assert outcome.failures == []
    assert any(note.startswith("relations tried: tokens permuted") for note in outcome.notes)
