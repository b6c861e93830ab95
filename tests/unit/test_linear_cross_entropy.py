"""Head and loss: right to rounding, a sum, exact over every split, and open about what is broken."""

from __future__ import annotations

import pytest
import torch
from rounding import within

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import linear_cross_entropy as op
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from tests.unit.loss_reference import reference


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


# Label smoothing, z-loss, both, and both on logits with a soft-cap and a scale.
TERMS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 4.0, "logit_scale": 0.5},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 0.5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: " ".join(terms) or "plain")
def test_linear_cross_entropy_within_rounding_of_float64(terms, dtype, monkeypatch):
    monkeypatch.setattr(op, "VOCAB_ROWS", 16)  # several vocabulary blocks
    op._vocabulary.cache_clear()
    hidden, weight, labels = problem(150, dtype=dtype)
    loss, count, grad, _ = run(hidden, weight, labels, **terms)
    op._vocabulary.cache_clear()
    wanted = reference(hidden, weight, labels, **terms)
    assert count == int((labels != -100).sum())
    assert abs(loss.item() - wanted.loss) <= wanted.loss_bound
    assert within(grad, wanted.gradient, wanted.gradient_bound)
    assert not grad[labels == -100].any()
    left_out = {name: value for name, value in terms.items() if name in ("softcap", "logit_scale")}
    if left_out != terms:  # the bounds tell the loss from one that forgot the terms
        plain = reference(hidden, weight, labels, **left_out)
        assert abs(plain.loss - wanted.loss) > 10 * wanted.loss_bound
        assert not within(plain.gradient, wanted.gradient, wanted.gradient_bound)


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]], ids=("plain", "all"))
def test_linear_cross_entropy_units_and_rows_do_not_depend_on_the_split(terms):
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
                _, _, grad, record = run(hidden, weight, labels, **terms)
            grads.append(grad)
            units += record.units
        for order in ((0, 1, 2), (2, 0, 1)):
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                whole = stream.Stream(tuple(lengths[i] for i in order), 16, order)
                hidden, labels = (torch.cat([parts[i][j] for i in order]) for j in (0, 2))
                with stream.use(whole):
                    loss, _, grad, record = run(hidden, weight, labels, **terms)
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
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"z_loss": -1e-4}, "z_loss is -0.0001"),
        ({"z_loss": float("inf")}, "z_loss"),
        ({"chosen": op.supervised(torch.tensor([1, 2, 3, 4]), ((0, 2), (2, 4)))}, "chosen: was found in 2 documents"),
    ],
)
def test_linear_cross_entropy_refuses_by_name(change, named):
    hidden, weight, labels = problem(4)
    given = {"hidden": hidden, "weight": weight, "labels": labels, **change}
    with pytest.raises(InputError, match=named):
        linear_cross_entropy(**given)
