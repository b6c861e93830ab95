"""Counter dropout: published Philox words, the keep rule, and keys that name tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastlora.errors import InputError
from fastlora.ops import dropout
from fastlora.ops.dropout import DropoutKey
from verify import oracle

ONES = 0xFFFFFFFF
# Known answers of Philox4x32-7 from the Random123 distribution (kat_vectors).
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES, ONES), (ONES,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_known_answers(key, counter, words):
    found = dropout.philox(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in found) == words


def _halves(seed, token, features):
    """The rule written out one element at a time."""
    halves = []
    for feature in range(features):
        counter = (token & ONES, token >> 32 & ONES, feature // 8, 0)
        found = dropout.philox((seed & ONES, seed >> 32), tuple(torch.tensor([c]) for c in counter))
        word = int(found[feature % 8 // 2])
        halves.append(word & 0xFFFF if feature % 2 == 0 else word >> 16)
    return halves


@pytest.mark.parametrize("features", [1, 3, 8, 10, 17])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.3, 1 - 2**-16])
def test_keep_mask_follows_the_rule(features, p):
    seed, tokens = (1 << 62) + 12345, [0, 5, -1, -(1 << 63), (1 << 40) + 3]
    mask = dropout.keep_mask(DropoutKey(seed, torch.tensor(tokens)), features, p)
    wanted = [[half >= round(p * 2**16) for half in _halves(seed, t, features)] for t in tokens]
    assert mask.tolist() == wanted


@pytest.mark.parametrize("features", [1, 7, 8, 100])
def test_keep_mask_is_the_oracles(features):
    tokens = torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(0))
    for p in (2**-16, 0.1, 0.5, 1 - 2**-16):
        found = dropout.keep_mask(DropoutKey(2**62 + 9, tokens), features, p)
        assert torch.equal(found, oracle.keep_mask(2**62 + 9, tokens, features, p))


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.1, 0.3, 0.5, 0.9, 1 - 2**-16])
def test_scale_keeps_the_mean_of_the_rounded_probability(p):
    kept = 1 - Fraction(dropout.threshold(p), 2**16)
    assert abs(Fraction(dropout.threshold(p), 2**16) - Fraction(p)) <= Fraction(1, 2**17)
    assert dropout.keep_scale(p) == np.float32(float(1 / kept))
    assert oracle.rate(p) == float(1 - kept)


def test_no_probability_means_no_dropout():
    assert (dropout.threshold(0.0), dropout.keep_scale(0.0)) == (0, 1.0)


def test_keep_mask_rows_depend_on_their_token_alone():
    tokens = torch.arange(1000, 1064)
    whole = dropout.keep_mask(DropoutKey(3, tokens), 37, 0.5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout.keep_mask(DropoutKey(3, tokens[order]), 37, 0.5), whole[order])
    part = dropout.keep_mask(DropoutKey(3, tokens).rows(8, 20), 37, 0.5)
    assert torch.equal(part, whole[8:20])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_mask_share(p):
    n = 200 * 512
    kept = int(dropout.keep_mask(DropoutKey(1, torch.arange(200)), 512, p).sum())
    # tolerance-rule: six standard deviations of the binomial count
    assert abs(kept - n * (1 - p)) < 6 * math.sqrt(n * p * (1 - p))


def test_keep_mask_zero_keeps_all():
    assert dropout.keep_mask(DropoutKey(1, torch.arange(4)), 9, 0.0).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 2**-18, 1 - 2**-18, float("nan")])
def test_keep_mask_refuses_probability(p):
    with pytest.raises(InputError, match="dropout is .*2.-16 to 1 - 2.-16"):
        dropout.keep_mask(DropoutKey(1, torch.arange(4)), 8, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_is_one_fp32_product_rounded_once(dtype):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = dropout.keep_mask(DropoutKey(1, torch.arange(5)), 8, 0.3)
    factor = np.float32(65536 / (65536 - 19661))
    wanted = torch.from_numpy(x.float().numpy() * factor) * keep
    assert torch.equal(dropout.apply(x, keep, 0.3), wanted.to(dtype))


def test_module_key_is_63_bits_and_takes_every_part():
    base = dropout.module_key(1, 2, "model.layers.0.q_proj")
    others = [
        dropout.module_key(2, 2, "model.layers.0.q_proj"),
        dropout.module_key(1, 3, "model.layers.0.q_proj"),
        dropout.module_key(1, 2, "model.layers.0.k_proj"),
        dropout.module_key(2, 1, "model.layers.0.q_proj"),
    ]
    assert 0 <= base < 1 << 63
    assert len({base, *others}) == 5
    assert base == dropout.module_key(1, 2, "model.layers.0.q_proj")
