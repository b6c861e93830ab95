"""The claim ``invariance``: it passes where bits do not move, sees those that do, and says where."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from verify import subjects
from verify.claims import invariance
from verify.claims.outcome import Budget
from verify.mutants import MUTANTS
from verify.mutants.table import UNSEEN, try_mutant
from verify.strategies import ordered
from verify.subject import DOCUMENT, ROW, Operation, Packed, Subject


def double(packed: Packed):
    return {"y": packed.cut(packed.x * 2), "dx": packed.cut(packed.dy * 2)}


def subject(run=double, sees=ROW) -> Subject:
    part = SimpleNamespace(
        alignment=4, streams=(8, 64), documents=2, dtypes=(torch.float32, torch.float16),
        operations=(Operation("double", 3, 3, run, sees),),
    )  # fmt: skip
    return Subject("another maker's", "cpu", operations=part)


def tried(made: Subject, cases: int = 6):
    return invariance.run(made, Budget(cases=cases), 0)


def test_invariance_of_every_operation_of_the_reference():
    made = subjects.built_in("cpu")[0]
    count = len(made.operations.operations)
    outcome = invariance.run(made, Budget(cases=count), 3)
    assert outcome.failures == []
    assert outcome.cases == count
    named = next(note for note in outcome.notes if note.startswith("cases:"))
    assert all(f"{o.name} 1" in named for o in made.operations.operations)


@pytest.mark.parametrize("sees", [ROW, DOCUMENT])
def test_invariance_takes_operations_of_another_maker(sees):
    outcome = tried(subject(sees=sees))
    assert outcome.verdict == "pass"
    assert outcome.cases == 6


def test_invariance_names_stream_place_and_values():
    def leaks(packed: Packed):
        return {"y": packed.cut(packed.x + packed.x.mean()), "dx": packed.cut(packed.dy)}

    told = tried(subject(leaks)).failures[0]
    assert "y, document of" in told
    assert "than alone (first at [0, 0]:" in told
    assert "RowsCase(operation=0" in told


def test_invariance_sees_a_row_that_knows_its_document():
    def total(packed: Packed):
        return {"y": [x + x.sum(0) for x in packed.cut(packed.x)], "dx": packed.cut(packed.dy)}

    assert tried(subject(total, DOCUMENT)).verdict == "pass"
    assert any("rows" in told for told in tried(subject(total, ROW)).failures)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_invariance_is_no_pass_for_constant_or_broken_results(value):
    def constant(packed: Packed):
        return {"y": packed.cut(torch.full_like(packed.x, value)), "dx": packed.cut(packed.dy)}

    assert any("control" in told for told in tried(subject(constant)).failures)


def test_invariance_tells_a_crash_with_its_case():
    def crashes(packed: Packed):
        raise RuntimeError("no kernel image")

    assert "raised RuntimeError: no kernel image" in tried(subject(crashes), 1).failures[0]


def test_invariance_without_operations_is_not_tried():
    outcome = tried(Subject("nothing", "cpu"))
    assert outcome.verdict == "not tried"
    assert outcome.reason == "the subject names no operations"


def test_same_bits_tells_zeros_apart_and_equates_a_nan_with_itself():
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert not invariance.same_bits(zero, -zero)
    assert invariance.same_bits(nan, nan.clone())
    assert not invariance.same_bits(zero, zero.half())


def test_packed_cuts_real_rows_at_aligned_starts():
    x = torch.arange(12.0)[:, None]
    packed = Packed((3, 1, 4), (1, 2, 3), 4, x, x, 0)
    assert packed.spans == ((0, 3), (4, 5), (8, 12))
    assert [t.flatten().tolist() for t in packed.cut(x)] == [[0, 1, 2], [4], [8, 9, 10, 11]]


def test_rows_cases_are_fixed_by_the_seed_and_reach_one_row_and_a_tile():
    cases = ordered("rows", ("fp32", "fp16"), 0)
    assert cases == ordered("rows", ("fp32", "fp16"), 0)
    lengths = {n for case in cases for n in case.lengths}
    assert min(lengths) == 1
    assert max(lengths) == 128


def test_mutants_of_operations_say_which_name_they_need():
    made = subject()
    verdicts = {m.name: try_mutant(m, made, 0) for m in MUTANTS if m.part == "operations"}
    assert len(verdicts) >= 5
    assert verdicts["stream's mean leaks"].verdict == "killed"
    assert verdicts["place in the stream"].verdict == UNSEEN
    assert "'RoPE'" in verdicts["place in the stream"].told


def test_invariance_tries_each_document_of_the_part_in_every_stream():
    seen = []

    def watch(packed: Packed):
        seen.append((packed.lengths, len(packed.x)))
        return double(packed)

    made = subject(watch, DOCUMENT)
    outcome = invariance.run(dataclasses.replace(made), Budget(cases=1), 0)
    assert outcome.verdict == "pass"
    assert {8, 64} <= {total for _, total in seen}


def test_invariance_says_where_torchs_own_products_are_called():
    def product(packed: Packed):
        x = packed.x.detach().requires_grad_()
        y = torch.mm(x, torch.eye(3, dtype=x.dtype))
        (dx,) = torch.autograd.grad(y, (x,), packed.dy)
        return {"y": packed.cut(y.detach()), "dx": packed.cut(dx)}

    notes = tried(subject(product, DOCUMENT), 1).notes
    assert "torch's own products (aten.mm) are called by double: no row's bits depended on M in these streams" in notes
    assert not any("torch's own products" in note for note in tried(subject(), 1).notes)
