"""Head and loss: right to rounding, a sum, exact over every split, and open about what is broken."""

from __future__ import annotations

import pytest
import torch
from rounding import UNIT, gamma, within

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import linear_cross_entropy as op
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy


def problem(rows, width=32, vocabulary=50, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.4] = -100
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(99)).to(dtype)
    return hidden, weight, labels


def run(hidden, weight, labels, **keywords):
    hidden = hidden.clone().requires_grad_()
    record = LossRecord()
    loss, count = linear_cross_entropy(hidden, weight, labels, record=record, **keywords)
    loss.backward()
    return loss.detach(), count, hidden.grad, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (4.0, 0.5)])
def test_linear_cross_entropy_within_rounding_of_float64(softcap, scale, dtype, monkeypatch):
    monkeypatch.setattr(op, "VOCAB_ROWS", 16)  # several vocabulary blocks
    op._vocabulary.cache_clear()
    hidden, weight, labels = problem(150, dtype=dtype)
    loss, count, grad, _ = run(hidden, weight, labels, softcap=softcap, logit_scale=scale)
    op._vocabulary.cache_clear()
    h, w = hidden.double().requires_grad_(), weight.double()
    z = h @ w.t()
    z = scale * (softcap * torch.tanh(z / softcap) if softcap else z)
    wanted = torch.nn.functional.cross_entropy(z, labels, reduction="sum", ignore_index=-100)
    wanted.backward()
    assert count == int((labels != -100).sum())
    size = float((h.detach().abs() @ w.abs().t()).max()) + float(z.detach().abs().max())
    off = gamma(hidden.shape[1] + 8) * size
    # A logit is off by ``off``; a row's loss by twice that and by its own sums, log and rounding.
    row = 2 * off + gamma(weight.shape[0] + 20) * (float(z.detach().abs().max()) + 5)
    # tolerance-rule: derived above
    assert abs(loss.item() - wanted.item()) <= count * row
    chosen = labels != -100
    p = torch.softmax(z.detach(), 1)[chosen]
    target = torch.nn.functional.one_hot(labels[chosen], weight.shape[0])
    share = 2 * off * (2 + 2 / (softcap or 1)) + gamma(2 * weight.shape[0] + 20)
    bound = scale * (share * (p + target)) @ w.abs() + UNIT[dtype] * h.grad[chosen].abs() * 1.01
    assert within(grad[chosen], h.grad[chosen], bound)
    assert not grad[~chosen].any()


def test_linear_cross_entropy_units_and_rows_do_not_depend_on_the_split():
    lengths = (150, 20, 33)
    made = [stream.Stream((n,), 16, (n,)) for n in lengths]
    parts = [problem(one.total, seed=one.total) for one in made]
    weight = parts[0][1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        grads, units = [], 0
        for one, (hidden, _, labels) in zip(made, parts):
            with stream.use(one):
                _, _, grad, record = run(hidden, weight, labels)
            grads.append(grad)
            units += record.units
        for order in ((0, 1, 2), (2, 0, 1)):
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                whole = stream.Stream(tuple(lengths[i] for i in order), 16, order)
                hidden, labels = (torch.cat([parts[i][j] for i in order]) for j in (0, 2))
                with stream.use(whole):
                    loss, _, grad, record = run(hidden, weight, labels)
                assert record.units == units
                assert loss.item() == units * 2.0**-40
                assert torch.equal(grad, torch.cat([grads[i] for i in order]))
                assert sum(record.documents.tolist()) == loss.item()  # multiples of 2^-40 add exactly
    finally:
        torch.set_num_threads(before)


def test_linear_cross_entropy_computes_supervised_rows_only():
    hidden, weight, labels = problem(64)
    hidden[labels == -100] = float("nan")
    loss, _, grad, record = run(hidden, weight, labels)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert record.not_finite == []


def test_linear_cross_entropy_names_the_document_that_is_not_finite():
    made = stream.Stream((20, 40), 16, (1, 2))
    hidden, weight, labels = problem(made.total)
    labels[40] = 3
    hidden[40, 0] = float("nan")
    with stream.use(made):
        loss, _, _, record = run(hidden, weight, labels)
    assert loss.isnan()
    assert record.not_finite == [1]
    assert record.documents[0].isfinite()
    assert sum(record.supervised) == int((labels != -100).sum())


def test_linear_cross_entropy_gradient_is_scaled_by_what_comes_from_above():
    hidden, weight, labels = problem(40)
    plain = run(hidden, weight, labels)[2]
    hidden.requires_grad_()
    (linear_cross_entropy(hidden, weight, labels)[0] * 4.0).backward()
    assert torch.equal(hidden.grad, plain * 4.0)


def test_linear_cross_entropy_without_a_supervised_row():
    hidden, weight, labels = problem(20)
    loss, count, grad, _ = run(hidden, weight, torch.full_like(labels, -100))
    assert (loss.item(), count) == (0.0, 0)
    assert not grad.any()


def test_linear_cross_entropy_without_gradient_has_the_same_value():
    hidden, weight, labels = problem(40)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert loss.item() == run(hidden, weight, labels)[0].item()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": torch.tensor([50, 1, 2, 3])}, "labels"),
        ({"labels": torch.tensor([-1, 1, 2, 3])}, "labels"),
        ({"labels": torch.tensor([1, 2])}, "labels"),
        ({"weight": torch.zeros(50, 31)}, "weight"),
        ({"weight": torch.zeros(50, 32, requires_grad=True)}, "frozen"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_linear_cross_entropy_refuses_by_name(change, named):
    hidden, weight, labels = problem(4)
    given = {"hidden": hidden, "weight": weight, "labels": labels, **change}
    with pytest.raises(InputError, match=named):
        linear_cross_entropy(**given)
