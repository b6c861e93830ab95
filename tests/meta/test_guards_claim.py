"""The claim ``guards``: reads and writes out of bounds, unwritten elements, inputs not refused or not by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from verify import pages, subjects
from verify.claims import guards
from verify.claims.outcome import Budget
from verify.mutants.base import Wrapped
from verify.plain import SUBJECT
from verify.subject import Refusal, Subject


def behind(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The element ``by`` places behind (or before) a tensor's span, as an unmasked access reaches it."""
    return torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + (tensor.numel() + by - 1 if by > 0 else by))


def planted(change) -> Subject:
    part = SUBJECT.linear

    def run(inputs, mode, divisor=1.0):
        return change(inputs, part.run(inputs, mode, divisor))

    return Subject("planted", "cpu", linear=Wrapped(part, run=run))


def reads(inputs, result):
    """What lies a row behind the weight is multiplied by 0: nothing, unless it is NaN."""
    y, room = result.y.clone(), inputs.weight.untyped_storage().nbytes() // inputs.weight.element_size()
    if y.numel() and inputs.weight.storage_offset() + inputs.weight.numel() < room:
        y[0, 0] += 0 * behind(inputs.weight, 1)[0]
    return dataclasses.replace(result, y=y)


def writes_input(inputs, result):
    """The element before A is overwritten."""
    if inputs.a.storage_offset() > 0:
        behind(inputs.a, -1).fill_(1.0)
    return result


def scratches(inputs, result):
    """An input is used as scratch memory."""
    inputs.b.add_(1.0)
    return result


def writes_buffer(inputs, result):
    """A new buffer's neighbour is overwritten."""
    buffer = torch.empty(5)
    if buffer.untyped_storage().nbytes() > 5 * 4 + 64:
        behind(buffer, 2).fill_(7.0)
    return result


def unwritten(inputs, result):
    """The last row of dx is never written; on a fresh page of memory it would be 0."""
    dx = torch.empty_like(result.dx)
    dx[:-1] = result.dx[:-1]
    return dataclasses.replace(result, dx=dx)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (reads, "y in pages of NaN: 1 elements are NaN"),
        (writes_input, "an input, or memory around it, was written"),
        (scratches, "an input, or memory around it, was written"),
        (writes_buffer, "memory around new buffers was written: shapes [(5,)]"),
        (unwritten, "dx in pages of NaN"),
    ],
)
def test_guards_sees_what_touches_memory_that_is_not_its_own(fault, told):
    failures = guards.run(planted(fault), Budget(cases=6), 0).failures
    assert any(told in failure for failure in failures), failures


def test_guards_holds_for_the_reference():
    subject = subjects.built_in("cpu")[0]
    outcome = guards.run(subject, Budget(cases=9), 0)
    assert outcome.failures == []
    refused = next(note for note in outcome.notes if note.startswith("bad inputs"))
    assert int(refused.rpartition(" ")[2]) > 120
    assert int(outcome.notes[-1].rpartition(" ")[2]) > 50


def listed(*refusals: Refusal) -> list[str]:
    subject = Subject("listed", "cpu", refusals=lambda: refusals, refuses=(ValueError,))
    return guards.run(subject, Budget(cases=1), 0).failures


def raises(error: Exception):
    def call() -> None:
        raise error

    return call


def test_guards_wants_a_refusal_of_the_right_kind_that_names_the_input():
    good = Refusal("rank 0", ("rank", "0"), raises(ValueError("rank is 0; allowed is 1 or more")), lambda: None)
    assert listed(good) == []
    (told,) = listed(dataclasses.replace(good, call=raises(ValueError("bad input"))))
    assert told.startswith("rank 0: refused without naming rank, 0: bad input")
    (told,) = listed(dataclasses.replace(good, call=raises(IndexError("list index out of range"))))
    assert "raised IndexError, no refusal" in told
    (told,) = listed(dataclasses.replace(good, call=lambda: None))
    assert "rank 0: not refused" in told
    (told,) = listed(dataclasses.replace(good, allowed=raises(ValueError("rank is 1"))))
    assert "control: the good neighbour of 'rank 0' raised ValueError" in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_embed_keeps_values_strides_and_alignment(dtype):
    base = torch.arange(84).reshape(12, 7).to(dtype)
    for tensor in (base, base.t(), base[:, 2:5], base[::3], base[:1].expand(4, 7), base[:0]):
        page = pages.embed(tensor, is_input=True)
        assert torch.equal(page.view, tensor)
        assert page.view.stride() == tensor.stride()
        if tensor.numel():
            assert (page.view.data_ptr() - tensor.data_ptr()) % pages.LINE == 0
        assert page.intact()
        page.flat[page.first - 1] = 0
        assert not page.intact()


def test_allocations_fill_new_buffers_and_put_torch_back():
    before = torch.empty, torch.Tensor.new_zeros
    with pages.allocations() as made:
        one, two = torch.empty(3, 5), torch.ones(2).new_zeros(4)
    assert (torch.empty, torch.Tensor.new_zeros) == before
    assert bool(one.isnan().all())
    assert not bool(two.any())
    assert [page.intact() for page in made] == [True, True]
    made[1].flat[made[1].last] = 0
    assert [page.intact() for page in made] == [True, False]
