"""Frozen linear and loss by the kernels in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from fastlora import stream
from fastlora.ops import backend
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from tests.unit.loss_reference import reference
from tests.unit.rounding import within

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 300), (70, 257), (3, 20)])
def test_linear_cross_entropy_matches_float64(rows, vocabulary, softcap):
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 32, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, 32, generator=g) * 0.3
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[0] = -100
    with backend.use("triton"):
        loss, count = linear_cross_entropy(hidden, weight, labels, softcap=softcap, logit_scale=0.5)
        loss.backward()
    exact = hidden.detach().double().requires_grad_()
    z = exact @ weight.double().t()
    z = 0.5 * (softcap * torch.tanh(z / softcap) if softcap else z)
    truth = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    truth.backward()
    assert count == rows - 1
    # each row: a dot of 32 terms, a sum of V exponentials, each good to a few units of fp32
    assert abs(loss.item() - truth.item()) <= rows * (vocabulary + 64) * 2.0**-24 * 16
    assert (hidden.grad.double() - exact.grad).abs().max() <= (vocabulary + 64) * 2.0**-24 * 16


TERMS = [
    {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 7.0, "logit_scale": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("terms", TERMS, ids=" ".join)
@pytest.mark.parametrize(("rows", "vocabulary"), [(70, 257), (3, 20)])
def test_linear_cross_entropy_with_smoothing_and_z_loss_within_rounding_of_float64(rows, vocabulary, terms):
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 32, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, 32, generator=g)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[0] = -100
    with backend.use("triton"):
        loss, _ = linear_cross_entropy(hidden, weight, labels, **terms)
        loss.backward()
        with torch.no_grad():
            again, _ = linear_cross_entropy(hidden, weight, labels, **terms)
    wanted = reference(hidden, weight, labels, **terms)
    assert again.item() == loss.item()
    assert abs(loss.item() - wanted.loss) <= wanted.loss_bound
    assert within(hidden.grad, wanted.gradient, wanted.gradient_bound)


def test_linear_cross_entropy_with_smoothing_and_z_loss_does_not_depend_on_the_split():
    g = torch.Generator().manual_seed(3)
    weight, found = torch.randn(300, 32, generator=g), []
    made = [stream.Stream((n,), 16, (n,)) for n in (20, 5)]
    hidden = [torch.randn(one.total, 32, generator=g) for one in made]
    labels = [torch.randint(300, (one.total,), generator=g) for one in made]
    for cut in ((0, 1), (1, 0), (0,), (1,)):
        leaf, record = torch.cat([hidden[i] for i in cut]).requires_grad_(), LossRecord()
        lengths = tuple((20, 5)[i] for i in cut)
        with backend.use("triton"), stream.use(stream.Stream(lengths, 16, lengths)):
            linear_cross_entropy(leaf, weight, torch.cat([labels[i] for i in cut]), record=record, **TERMS[2])[0].backward()
        found.append((record.units, dict(zip(cut, leaf.grad.split([made[i].total for i in cut])))))
    (both, first), (turned, second), (one, third), (other, fourth) = found
    assert both == turned == one + other
    for i, alone in ((0, third), (1, fourth)):
        assert torch.equal(first[i], second[i])
        assert torch.equal(first[i], alone[i])


def test_frozen_linear_matches_reference():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((45, 33), (50, 33), (50,)))
    found = []
    for name in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with backend.use(name):
            y = frozen_linear(leaf, weight, bias)
            y.sum().backward()
        found.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() <= 64 * 2.0**-24 * theirs.abs().max() * 4
