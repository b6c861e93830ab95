"""The oracles against finite differences, float64 autograd, torch's own AdamW and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verify import oracle
from verify.bounds import unit_roundoff
from verify.oracle.philox import philox4x32

U64 = unit_roundoff(torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


@pytest.fixture
def tensors() -> dict:
    m, k, n, r = 7, 11, 5, 3
    return {
        "x": draw(m, k), "weight": draw(n, k), "a": draw(r, k), "b": draw(n, r), "scale": 1.75,
        "bias": draw(n), "keep": draw(m, k, seed=1) > -0.5, "p": 0.25,
    }  # fmt: skip


def test_lora_linear_backward_agrees_with_autograd(tensors):
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("x", "a", "b")}
    dy = draw(7, 5, seed=2)
    y = oracle.lora_linear_forward(**{**tensors, **leaves})
    expected = torch.autograd.grad(y, tuple(leaves.values()), dy)
    rest = {name: tensors[name] for name in ("x", "weight", "a", "b", "scale", "keep", "p")}
    got = oracle.lora_linear_backward(dy, **rest)
    # tolerance-rule: both are float64 sums of at most 11 * 5 terms below 100: gamma_64 * 6400
    slack = 64 * U64 * 6400
    for mine, theirs in zip((got.dx, got.da, got.db), expected):
        assert float((mine - theirs).abs().max()) <= slack


def test_lora_linear_backward_agrees_with_finite_differences(tensors):
    dy, step = draw(7, 5, seed=2), 2.0**-10
    rest = {name: tensors[name] for name in ("x", "weight", "a", "b", "scale", "keep", "p")}
    got = oracle.lora_linear_backward(dy, **rest)
    for name, gradient in (("x", got.dx), ("a", got.da), ("b", got.db)):
        way = draw(*tensors[name].shape, seed=3)
        ends = []
        for sign in (1, -1):
            moved = {**tensors, name: tensors[name] + sign * step * way}
            ends.append(float((oracle.lora_linear_forward(**moved) * dy).sum()))
        difference, expected = (ends[0] - ends[1]) / (2 * step), float((gradient * way).sum())
        # tolerance-rule: the loss is linear in x, in A and in B, so central differences truncate
        # nothing; what is left is float64 rounding of sums of about 1000 terms below 100, divided
        # by the step
        assert abs(difference - expected) <= 1000 * U64 * 1e5 / step


def test_adamw_oracle_agrees_with_torch_in_float64():
    hyper = oracle.Hyper(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    start = {"a": draw(4, 3), "b": draw(2, 4)}
    mine = oracle.AdamWOracle(start, hyper)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=hyper.lr, weight_decay=hyper.weight_decay)
    for step in range(5):
        gradients = {name: draw(*p.shape, seed=step) for name, p in start.items()}
        clip = 0.5 / float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        for name, parameter in theirs.items():
            parameter.grad = gradients[name] * min(1.0, clip)
        optimizer.step()
        got = mine.step(gradients)
        for name, parameter in theirs.items():
            # tolerance-rule: 20 float64 roundings a step on values below 4
            assert float((got[name] - parameter.detach()).abs().max()) <= 5 * 20 * U64 * 4


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [
        ([0] * 4, (0, 0), 10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0] * 4, (0, 0), 7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), 10, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), 7, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0), 10,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0), 7,
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)  # fmt: skip
def test_philox4x32_gives_the_known_answers(counter, key, rounds, words):
    got = philox4x32(np.array([counter], dtype=np.uint64), key, rounds)
    assert got[0].tolist() == words


def test_keep_mask_keeps_the_promised_share_and_is_a_function_of_its_key():
    tokens, p = torch.arange(400), 0.25
    mask = oracle.keep_mask(5, tokens, 100, p)
    # tolerance-rule: 40,000 independent draws: six standard deviations of a mean
    assert abs(float(mask.double().mean()) - (1 - p)) <= 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert torch.equal(mask[7:9], oracle.keep_mask(5, tokens[7:9], 100, p))
    assert not torch.equal(mask, oracle.keep_mask(6, tokens, 100, p))


def test_keep_mask_compares_half_a_word_a_feature():
    token, seed, p = (7 << 32) + 3, (5 << 32) + 11, 0.3
    words = philox4x32(np.array([[3, 7, group, 0] for group in range(2)], dtype=np.uint64), (11, 5))
    numbers = [int(w) >> shift & 0xFFFF for group in words for w in group for shift in (0, 16)]
    mask = oracle.keep_mask(seed, torch.tensor([token]), 13, p)
    assert mask[0].tolist() == [number >= 19661 for number in numbers[:13]]
    assert oracle.rate(p) == 19661 / 65536


def test_md5_of_tensor_sees_dtype_shape_and_the_sign_of_zero():
    zero = torch.zeros(6)
    others = (-zero, zero.reshape(2, 3), zero.to(torch.int32), zero[:5])
    digests = {oracle.md5_of_tensor(t) for t in (zero, *others)}
    assert len(digests) == 5
    assert oracle.md5_of_tensor(zero.reshape(2, 3).t()) == oracle.md5_of_tensor(torch.zeros(3, 2))
