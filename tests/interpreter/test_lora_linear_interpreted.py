"""The Triton kernels in the interpreter, against the torch reference, on shapes with every kind of edge."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlora.exact import TokenSum
from fastlora.ops import backend
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.lora_linear import lora_linear

pytestmark = pytest.mark.interpreter

# tokens, K, N, rank, dropout, bias: one row, primes, tile edges, rank above the dS-in-one-pass limit, and M = 0
CASES = [
    (1, 32, 48, 1, 0.0, False),
    (37, 40, 24, 3, 0.0, True),
    (129, 33, 65, 16, 0.1, False),
    (64, 96, 32, 20, 0.5, True),
    (130, 48, 40, 64, 0.1, False),
    (0, 32, 32, 4, 0.0, False),
    (5, 7, 11, 40, 0.0, True),
]


def make(case, dtype, seed=0):
    tokens, inner, outer, rank, dropout, bias = case
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    x = draw(tokens, inner).to(dtype).requires_grad_()
    weight = (draw(outer, inner) / inner**0.5).to(dtype)
    a = (draw(rank, inner) / inner**0.5).requires_grad_()
    b = (draw(outer, rank) / rank**0.5).requires_grad_()
    dy = draw(tokens, outer).to(dtype)
    bias = draw(outer).to(dtype) if bias else None
    key = DropoutKey(2**61 + 12345, torch.arange(tokens) * 2**33 + 7) if dropout else None
    return x, weight, a, b, dy, bias, dropout, key


def run(name, case, dtype, *, exact):
    x, weight, a, b, dy, bias, dropout, key = make(case, dtype)
    sums = (TokenSum(a.shape), TokenSum(b.shape)) if exact else None
    with backend.use(name):
        y = lora_linear(x, weight, a, b, 1.5, bias, dropout=dropout, key=key, sums=sums)
        y.backward(dy)
    if exact:
        assert a.grad is None and b.grad is None
        return y.detach(), x.grad, sums[0], sums[1]
    return y.detach(), x.grad, a.grad, b.grad


def bound(case, dtype, reference):
    """Two results that round alike differ by the order of fp32 sums and one flipped rounding of S, dS and the output.

    Each is at most (terms + 4) units of the sum's own scale; the scale is bounded by the largest element times sqrt(terms).
    """
    tokens, inner, outer, rank, *_ = case
    unit = {torch.float32: 2.0**-23, torch.float16: 2.0**-10}[dtype]
    terms = max(inner, outer, rank, tokens, 1)
    return 8 * (unit + terms * 2.0**-23) * max(reference.abs().max().item() if reference.numel() else 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "M{}-K{}-N{}-r{}-p{}-bias{:d}".format(*c))
def test_lora_linear_matches_reference(case, dtype):
    for ours, theirs in zip(run("triton", case, dtype, exact=False), run("reference", case, dtype, exact=False)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert not torch.isnan(ours).any()
        worst = (ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0
        assert worst <= bound(case, dtype, theirs)


@pytest.mark.parametrize("of", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", [CASES[1], (64, 96, 32, 20, 0.5, True)], ids=["rank 3", "rank 20"])
def test_an_eager_call_has_the_operator_s_bits(case, of):
    """Which copies A and B itself, in each direction."""
    results = []
    for operator in (False, True):
        x, weight, a, b, dy, bias, dropout, key = make(case, torch.float16)
        a, b = (t.detach().to(of).requires_grad_() for t in (a, b))
        seed, tokens = (0, None) if key is None else (key.seed, key.tokens)
        with backend.use("triton"):
            if operator:
                y, _ = torch.ops.fastlora.lora_linear(x, weight, a, b, 1.5, bias, dropout, seed, tokens)
            else:
                y = lora_linear(x, weight, a, b, 1.5, bias, dropout=dropout, key=key)
            y.backward(dy)
        assert a.grad.dtype == b.grad.dtype == of and a.grad.shape == a.shape and b.grad.shape == b.shape
        results.append((y, x.grad, a.grad, b.grad))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: "M{}-K{}-N{}-r{}-p{}-bias{:d}".format(*c))
def test_lora_linear_exact_sums_match_reference(case):
    _, _, sum_a, sum_b = run("triton", case, torch.float32, exact=True)
    _, _, da, db = run("reference", case, torch.float32, exact=False)
    for ours, theirs in ((sum_a, da), (sum_b, db)):
        ours.check("layer")
        assert ours.chunks == -(-case[0] // 128)
        worst = (ours.gradient(1.0) - theirs).abs().max().item()
        assert worst <= bound(case, torch.float32, theirs)


def test_lora_linear_exact_sums_equal_for_every_cut():
    """Chunks of 128 tokens added one micro-batch at a time or all at once: the same integers."""
    x, weight, a, b, dy, *_ = make((512, 32, 48, 8, 0.0, False), torch.float32)
    totals = []
    for cuts in ([512], [128] * 4, [256, 128, 128], [384, 128]):
        sums = (TokenSum(a.shape), TokenSum(b.shape))
        start = 0
        for size in cuts:
            with backend.use("triton"):
                y = lora_linear(x[start : start + size], weight, a, b, 2.0, sums=sums)
                y.backward(dy[start : start + size])
            start += size
        totals.append(torch.cat([sums[0].total.flatten(), sums[1].total.flatten()]))
    for one, other in itertools.pairwise(totals):
        assert torch.equal(one, other)
    assert totals[0].abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_lora_linear_exact_names_the_first_broken_chunk(value):
    x, weight, a, b, dy, *_ = make((400, 32, 48, 8, 0.0, False), torch.float32)
    dy[300, 5] = value
    sums = (TokenSum(a.shape), TokenSum(b.shape))
    with backend.use("triton"):
        lora_linear(x, weight, a, b, 2.0, sums=sums).backward(dy)
    assert sums[1].stats[0].item() == 2
    with pytest.raises(RuntimeError, match="layer"):
        sums[1].check("layer")


@pytest.mark.usefixtures("poisoned")
def test_lora_linear_writes_every_element():
    for case in CASES[:5]:
        for result in run("triton", case, torch.float32, exact=False):
            assert not torch.isnan(result).any()


@pytest.mark.parametrize("rank", [1, 16, 20, 200])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_of_a_and_b_are_casts_with_a_rank_of_zeros(dtype, of, rank):
    from fastlora.kernels.factors import copy_factors
    from fastlora.kernels.launch import padded_rank

    g = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*s, generator=g).to(of) for s in ((rank, 70), (33, rank)))
    padded = padded_rank(rank)
    expected = a.new_zeros(padded, 70, dtype=dtype), b.new_zeros(33, padded, dtype=dtype)
    expected[0][:rank], expected[1][:, :rank] = a, b
    # Triton's interpreter cuts fp32 off to bf16; what a GPU's instruction does is tests/compile's matter
    cut = of == torch.float32 and dtype == torch.bfloat16
    for found, wanted, source in zip(copy_factors(a, b, dtype), expected, (a, b)):
        assert found.dtype == dtype and found.shape == wanted.shape
        if cut:
            inside = tuple(slice(n) for n in source.shape)
            wanted[inside] = (source.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(found, wanted)
