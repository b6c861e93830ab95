"""AdamW's kernels in Triton's interpreter: the same bits as the torch path, for exact sums and for ordinary gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.errors import TrainingError
from fastlora.ops import backend
from fastlora.ops.adamw_triton import Flat, Parameters, Scalars
from fastlora.optim import AdamW
from fastlora.token_sum import units_to_gradient

pytestmark = pytest.mark.interpreter

SHAPES = [(3, 5), (257,), (70, 61), (1,)]


def run(path: str, steps: int = 3, broken: bool = False):
    """(gradient norms, parameters and state) after some steps on one path."""
    g = torch.Generator().manual_seed(3)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES])
    optimizer = AdamW(model, lr=2e-3, weight_decay=0.1, max_grad_norm=0.7)
    norms = []
    for step in range(steps):
        for place, p in enumerate(model):
            p.grad = torch.randn(p.shape, generator=g) * 10.0 ** -(place + step)
        if broken:
            model[2].grad[5, 7] = float("nan")
        with backend.use(path):
            norms.append(optimizer.step(supervised_tokens=7).grad_norm)
    return norms, [t for p in model for t in (p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]


def test_step_by_kernels_has_the_bits_of_the_torch_path():
    norms, ours = run("triton")
    wanted_norms, wanted = run("reference")
    # the norm is summed in another order: a few units in the last place of float64, which no fp32 below it shows here
    assert all(abs(a - b) <= 2.0**-48 * b for a, b in zip(norms, wanted_norms, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_step_by_kernels_names_a_gradient_that_is_not_finite():
    with pytest.raises(TrainingError, match="2: the gradient is NaN"):
        run("triton", broken=True)


def test_update_reads_integer_units_divided_once():
    units = torch.tensor([2**40 * 3, -(2**39), 1, 0, 2**62])
    p, m, v = torch.ones(5), torch.zeros(5), torch.zeros(5)
    parameters = Parameters([Flat(units, p, m, v)])
    versions = [t._version for t in (p, m, v)]
    parameters.update(Scalars(3.0, beta1_rest=1.0, beta2_rest=1.0, eps=1.0))
    gradient = units_to_gradient(units, 3.0)
    assert torch.equal(m, gradient) and torch.equal(v, (gradient.double() ** 2).float())
    assert torch.equal(parameters.squares(3.0), (gradient.double() ** 2).sum()[None])
    assert torch.equal(p, torch.ones(5))
    # 16-bit copies of A and B are made again when this number changes
    assert all(t._version > before for t, before in zip((p, m, v), versions, strict=True))
