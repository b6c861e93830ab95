"""Frozen linear and loss by the kernels in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import backend
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.linear_cross_entropy import linear_cross_entropy

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
