"""Experts with adapters by the Triton kernels in the interpreter, against the torch reference."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastlora.config import LoraConfig
from fastlora.exact import discard, exact
from fastlora.experts import LoraExperts
from fastlora.inject import inject
from fastlora.ops import backend
from tests.models import EXPERTS, ON_EXPERTS, tiny_model

pytestmark = pytest.mark.interpreter


def run(name, *, exactly):
    """(output, gradient of the input, gradients of A and B of both parameters, chunks of their sums) by one backend."""
    model = tiny_model("mixtral", layers=1, **EXPERTS["mixtral"])
    inject(model, LoraConfig(r=3, init_lora_weights=False, target_modules=[], **ON_EXPERTS), seed=1)
    experts = next(m for m in model.modules() if isinstance(m, LoraExperts))
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(37, 32, generator=g).requires_grad_(), torch.rand(37, 2, generator=g)
    index = torch.stack([torch.randperm(3, generator=g)[:2] for _ in range(37)])  # no token goes to the last expert
    with backend.use(name), exact(model) if exactly else contextlib.nullcontext():
        y = experts(x, index, weights)
        y.backward(torch.randn(37, 32, generator=g))
    if not exactly:
        return y.detach(), x.grad, [f.weight.grad for a in experts.adapters for f in (a.lora_A, a.lora_B)], []
    sums = [total for adapter in experts.adapters for total in adapter.sums]
    gradients = [total.gradient(1.0) for total in sums]
    found = y.detach(), x.grad, gradients, [total.chunks for total in sums]
    discard(model)
    return found


@pytest.mark.parametrize("exactly", [False, True], ids=["grad", "exact"])
def test_experts_match_reference(exactly):
    y, dx, gradients, chunks = run("triton", exactly=exactly)
    wanted_y, wanted_dx, wanted, _ = run("reference", exactly=False)
    assert chunks == ([3] * 4 if exactly else [])  # 37 tokens at most are one chunk for each of three experts
    for ours, theirs in zip((y, dx, *gradients), (wanted_y, wanted_dx, *wanted)):
        assert ours.shape == theirs.shape and theirs.any()
        # Two orders of the same fp32 sums of at most 48 terms, one after the other through four products.
        assert (ours - theirs).abs().max() <= 4 * 8 * 49 * 2.0**-23 * max(theirs.abs().max().item(), 1.0)
        assert torch.equal(ours != 0, theirs != 0)
