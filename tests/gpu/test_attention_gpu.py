"""The attention kernels on a GPU: against float64, and independent of neighbours, place and stream length."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.attention import attention
from tests.attention_cases import CASES, draw, name, oracle, spans_of, worst_share

pytestmark = pytest.mark.gpu
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WIDE = [
    (9, 3, 64, 64, (128, 640, 1280), None, None),
    (8, 2, 128, 128, (1024, 384), 256, None),
    (4, 2, 256, 256, (512, 128), None, 50.0),
]


def run(parts, dout, spans, scale, window, cap):
    leaves = [t.detach().clone().requires_grad_() for t in parts]
    out = attention(*leaves, spans, scale, window, cap)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("dtype", list(UNIT), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES + WIDE, ids=name)
def test_attention_matches_float64(case, dtype):
    q, k, v, dout = draw(case, dtype, "cuda")
    spans, scale = spans_of(case[4]), case[2] ** -0.5
    exact = oracle(q, k, v, dout, spans, scale, *case[5:])
    # 16-bit: P and dS are rounded before their products, a relative rounding each; fp32: the sums over keys
    terms = 4 * max(case[4]) if dtype == torch.float32 else 16
    for ours, truth in zip(run((q, k, v), dout, spans, scale, *case[5:]), exact):
        assert worst_share(ours, truth, UNIT[dtype], terms) <= 1.0


@pytest.mark.parametrize("case", WIDE, ids=name)
def test_attention_does_not_depend_on_neighbours(case):
    q, k, v, dout = draw(case, torch.bfloat16, "cuda")
    spans, scale = spans_of(case[4]), case[2] ** -0.5
    out, *grads = run((q, k, v), dout, spans, scale, *case[5:])
    for _ in range(5):
        again = run((q, k, v), dout, spans, scale, *case[5:])
        assert all(torch.equal(a, b) for a, b in zip((out, *grads), again))
    for start, stop in spans:
        parts = [t[:, :, start:stop] for t in (q, k, v)]
        alone = run(parts, dout[:, start:stop], ((0, stop - start),), scale, *case[5:])
        assert torch.equal(alone[0], out[:, start:stop])
        for one, many in zip(alone[1:], grads):
            assert torch.equal(one, many[:, :, start:stop])
