"""RMSNorm and the gate over fixed tiles: the models' own bits forward, float64 backward."""

from __future__ import annotations

import pytest
import torch
from rounding import gamma, within
from torch.nn import functional

from fastlora.errors import InputError
from fastlora.ops.glu import ACTIVATIONS, glu
from fastlora.ops.rms_norm import STYLES, rms_norm

EPS = 1e-5


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("style", STYLES)
def test_rms_norm_within_rounding_of_float64(style):
    x, weight, dy = draw((300, 40), (40,), (300, 40))
    x.requires_grad_()
    y = rms_norm(x, weight, EPS, style)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    factor = (1.0 + weight if style == "offset" else weight).double()
    rstd = torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + EPS)
    wanted = x64 * rstd * factor
    wanted.backward(dy.double())
    n, dn = (x64 * rstd).detach().abs(), (dy.double() * factor).abs()
    size = (dn + n * (n * dn).mean(-1, keepdim=True)) * rstd.detach()
    # tolerance-rule: a row's mean has 40 terms; a handful of products follow
    assert within(y.detach(), wanted.detach(), gamma(60) * wanted.detach().abs())
    assert within(x.grad, x64.grad, gamma(160) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_glu_has_the_bits_of_torch(activation, dtype):
    gate, up, dh = (x.to(dtype) for x in draw((300, 48), (300, 48), (300, 48)))
    plain = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation]
    results = []
    for call in (lambda g, u: glu(g, u, activation), lambda g, u: plain(g) * u):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        h = call(*leaves)
        h.backward(dh)
        results.append([h.detach(), *(x.grad for x in leaves)])
    # Whole tiles of 48 columns have no vector tail, so even the exponentials agree.
    assert all(torch.equal(one, two) for one, two in zip(*results))


def test_rms_norm_and_glu_refuse_by_name():
    x, weight = draw((4, 8), (8,))
    with pytest.raises(InputError, match="style"):
        rms_norm(x, weight, EPS, "other")
    with pytest.raises(InputError, match="requires_grad"):
        rms_norm(x, weight.requires_grad_(), EPS)
    with pytest.raises(InputError, match="activation"):
        glu(x, x, "relu")
    with pytest.raises(InputError, match="must agree"):
        glu(x, x[:2])
