"""The attention kernels in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import backend
from fastlora.ops.attention import attention
from tests.attention_cases import CASES, draw, name, oracle, spans_of, worst_share

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attention_matches_float64(case):
    q, k, v, dout = draw(case, torch.float32, "cpu")
    spans, window, cap = spans_of(case[4]), case[5], case[6]
    scale = case[2] ** -0.5
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with backend.use("triton"):
        out = attention(*leaves, spans, scale, window, cap)
        grads = torch.autograd.grad(out, leaves, dout)
    for ours, exact in zip((out.detach(), *grads), oracle(q, k, v, dout, spans, scale, window, cap)):
        assert worst_share(ours, exact, 2.0**-24, 4 * max(case[4])) <= 1.0


def test_attention_does_not_depend_on_neighbours():
    case = CASES[0]
    q, k, v, dout = draw(case, torch.float32, "cpu")
    spans = spans_of(case[4])

    def run(parts, dout, spans):
        leaves = [t.detach().clone().requires_grad_() for t in parts]
        with backend.use("triton"):
            out = attention(*leaves, spans, 0.2)
            return out.detach(), *(g.transpose(1, 2) for g in torch.autograd.grad(out, leaves, dout))

    together = run((q, k, v), dout, spans)
    for start, stop in spans:
        alone = run([t[:, :, start:stop] for t in (q, k, v)], dout[:, start:stop], ((0, stop - start),))
        for one, many in zip(alone, together):
            assert torch.equal(one, many[:, start:stop])


@pytest.mark.parametrize("case", CASES[:3], ids=name)
def test_attention_backward_has_the_same_bits_however_blocks_are_masked(case, monkeypatch):
    """Which of the two is run hangs on the version of Triton (kernels/attention.py)."""
    from fastlora.kernels import attention as file

    q, k, v, dout = draw(case, torch.float32, "cpu")
    spans, window, cap = spans_of(case[4]), case[5], case[6]
    found = []
    for apart in (True, False):
        monkeypatch.setattr(file, "MASKS_APART", apart)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        with backend.use("triton"):
            found.append(torch.autograd.grad(attention(*leaves, spans, case[2] ** -0.5, window, cap), leaves, dout))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
