"""The strategies: one ordered list a seed, the promised corners in it, inputs that are what they
say."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from verify.strategies import DTYPES, LinearCase, cuts_of, endless, ordered

NAMES = ("fp32", "bf16", "fp16")


@pytest.fixture(scope="module")
def cases() -> tuple[LinearCase, ...]:
    return ordered("linear", NAMES, 0)


def test_ordered_is_fixed_by_the_seed(cases):
    ordered.cache_clear()
    assert ordered("linear", NAMES, 0) == cases
    assert ordered("linear", NAMES, 1) != cases
    assert len(set(cases)) == len(cases) > 250


def test_ordered_does_not_change_with_the_modules_that_are_loaded(cases, tmp_path, monkeypatch):
    (tmp_path / "numbers_of_ours.py").write_text("NUMBERS = [77, 101, 211, 223, 227, 229, 233, 239, 241, 251]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("numbers_of_ours")
    ordered.cache_clear()
    assert ordered("linear", NAMES, 0) == cases


def test_linear_cases_reach_the_corners(cases):
    assert {c.dtype for c in cases} == set(NAMES)
    assert {0, 1} <= {c.m for c in cases}
    assert min(c.r for c in cases) == 1
    assert max(c.r for c in cases) > 128
    assert max(c.m for c in cases) > 256
    assert {"lora_alone", "grid", "cancelling", "heavy"} <= {c.values for c in cases}
    assert {c.rslora for c in cases} == {c.bias for c in cases} == {True, False}
    assert any(c.dropout for c in cases)


def test_linear_case_is_reproduced_by_its_text(cases):
    for case in cases[:20]:
        again = eval(repr(case), {"LinearCase": LinearCase})
        assert again == case
        assert torch.equal(again.inputs().x, case.inputs().x)


def test_linear_case_has_the_shapes_strides_and_values_it_says(cases):
    seen = set()
    for case in cases[:120]:
        inputs = case.inputs()
        assert inputs.x.shape == (case.m, case.k)
        assert inputs.dy.shape == (case.m, case.n)
        assert inputs.x.dtype == DTYPES[case.dtype]
        assert bool(inputs.x.isfinite().all())
        assert bool(inputs.dy.isfinite().all())
        if case.values == "lora_alone":
            assert not bool(inputs.weight.any())
        if case.values == "grid":
            assert torch.equal(inputs.x, inputs.x.round())
        if case.m > 1 and case.k > 1:
            seen.add((case.layout, inputs.x.is_contiguous()))
    strided = {"columns", "transposed", "rows", "expanded"}
    assert {(name, False) for name in strided} | {("plain", True)} <= seen


def test_split_cases_are_uneven_and_cross_the_tile():
    cases = ordered("split", NAMES, 0)
    assert all(3 <= len(c.lengths) <= 7 for c in cases)
    assert any(max(c.lengths) > 128 for c in cases)
    assert sum(len(set(c.lengths)) > 1 for c in cases) > 0.8 * len(cases)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_cuts_of_cover_every_sequence_once_and_differ(count):
    cuts = cuts_of(count, 11)
    for cut in cuts.values():
        assert sorted(i for group in cut for i in group) == list(range(count))
    assert len(set(cuts.values())) >= 5
    assert len({len(cut) for cut in cuts.values()}) >= 3


def test_endless_goes_on_after_the_list_and_is_fixed_too():
    listed = ordered("split", NAMES, 4)
    more = list(itertools.islice(endless("split", NAMES, 4), len(listed) + 5))
    assert tuple(more[: len(listed)]) == listed
    assert more[len(listed) :] == list(ordered("split", NAMES, 4 + 1_000_003)[:5])
