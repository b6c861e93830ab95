"""Rounding bounds: they hold for correct results of any order, and are not so wide that they say
nothing."""

from __future__ import annotations

import pytest
import torch

from verify import graphs, oracle
from verify.bounds import Accumulator, Bounded, accumulate, exact, grid_of, store, unit_roundoff
from verify.claims import accuracy
from verify.claims.outcome import Budget
from verify.graphs import AdamWBounds, Roundings
from verify.judge import around, judge
from verify.plain import SUBJECT, PlainLinear
from verify.strategies import DTYPES, LinearCase, ordered


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated_sum(terms: torch.Tensor, block: int = 4) -> torch.Tensor:
    """Sums along the last axis as tensor cores do: a block's addends and the running sum are cut at
    the last
    of 24 bits of the largest of them, then added."""
    total = torch.zeros(terms.shape[:-1], dtype=torch.float64)
    for part in terms.split(block, dim=-1):
        addends = torch.cat([total[..., None], part], dim=-1)
        unit = 2.0 ** (torch.frexp(addends.abs().amax(-1, keepdim=True))[1].double() - 24)
        total = ((addends / unit).trunc() * unit).sum(-1)
    return total.float().double()


@pytest.mark.parametrize("order", ["forward", "backward", "pairwise"])
@pytest.mark.parametrize("length", [1, 3, 64, 1000])
def test_accumulate_holds_for_fp32_sums_in_any_order(order, length):
    p, q = draw(5, length).float(), draw(length, 6, seed=1).float()
    bound = accumulate([(exact(p), exact(q))], [], Accumulator())
    terms = p[:, None, :] * q.T[None]
    if order == "backward":
        terms = terms.flip(-1)
    if order == "pairwise":
        while terms.shape[-1] > 1:
            terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2))
            terms = terms[..., ::2] + terms[..., 1::2]
        total = terms[..., 0]
    else:
        total = torch.zeros(5, 6)
        for i in range(length):
            total = total + terms[..., i]
    assert judge(total, bound).share <= 1


@pytest.mark.parametrize("length", [4, 64, 1000])
def test_accumulate_holds_for_truncating_tensor_cores(length):
    p, q = draw(5, length).bfloat16().double(), draw(length, 6, seed=1).bfloat16().double()
    bound = accumulate([(exact(p), exact(q))], [], Accumulator(truncating=True))
    total = truncated_sum(p[:, None, :] * q.T[None])
    share = judge(total, bound).share
    assert share <= 1
    # four products of 16 bits fit into the accumulator whole; over many, something is cut
    assert share > 0 or length == 4


def test_accumulate_is_exact_on_small_integers_and_catches_one_unit():
    p = torch.randint(-4, 5, (8, 300), generator=torch.Generator().manual_seed(0)).double() / 4
    bound = accumulate([(exact(p), exact(p.T))], [], Accumulator(truncating=True))
    assert not bool(bound.radius.any())
    assert judge(p @ p.T + grid_of(p) ** 2, bound).share == float("inf")


def test_store_contains_the_rounded_value_and_stays_within_one_rounding():
    value, radius = (
        draw(1000) * 2.0 ** draw(1000, seed=1).round(),
        torch.full((1000,), 1e-4).double(),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored = store(Bounded(value, radius), dtype)
        for shift in (-1, 0, 1):
            assert judge((value + shift * radius).to(dtype), stored).share <= 1
        widest = (
            radius
            + unit_roundoff(dtype) * (value.abs() + radius)
            + torch.finfo(dtype).smallest_normal
        )
        assert bool((stored.radius <= widest).all())


def test_store_of_a_representable_value_has_no_radius():
    value = torch.tensor([1.0, -2.5, 256.0, 0.0], dtype=torch.float64)
    assert not bool(store(exact(value), torch.bfloat16).radius.any())


def test_store_does_not_judge_what_overflows():
    stored = store(exact(torch.tensor([1e6])), torch.float16)
    assert judge(torch.tensor([float("inf")]), stored).skipped == 1


@pytest.mark.parametrize("seed", range(2))
def test_lora_linear_graph_holds_for_a_plain_subject(seed):
    outcome = accuracy.run(SUBJECT, Budget(cases=15), seed)
    assert outcome.cases == 15
    assert outcome.failures == []


CASE = LinearCase(
    m=130, k=96, n=65, r=8, dtype="fp32", alpha=16.0, rslora=False, bias=True, dropout=0.0,
    values="normal", size=1.0, layout="plain", seed=3,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("values", ["normal", "lora_alone", "grid"])
@pytest.mark.parametrize("name", ["y", "dx", "da", "db"])
def test_lora_linear_bound_catches_three_times_itself(dtype, values, name):
    case = LinearCase(**{**CASE.__dict__, "dtype": dtype, "values": values})
    inputs, part = case.inputs(), PlainLinear()
    result = part.run(inputs, "grad")
    bounds = accuracy.bounds_of(inputs, result, part.roundings(inputs.x.dtype, "grad"), 1.0)
    bound = getattr(bounds, name)
    assert judge(getattr(result, name), bound).share <= 1
    smallest = unit_roundoff(DTYPES[dtype]) * bound.value.abs().max()
    moved = bound.value.clone()
    moved[-1, -1] += 3 * bound.radius[-1, -1] + (smallest if bound.radius[-1, -1] == 0 else 0)
    assert judge(moved, bound).share > 1


@pytest.mark.parametrize("name", ["y", "dx", "da", "db"])
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 2.0**-10), ("bf16", 2.0**-4)])
def test_lora_linear_bound_is_far_below_the_lora_part(dtype, most, name):
    """Not vacuous: where LoRA stands alone, the bound is a small part of a typical element."""
    case = LinearCase(**{**CASE.__dict__, "dtype": dtype, "values": "lora_alone", "bias": False})
    inputs = case.inputs()
    rules = Roundings.fused(inputs.x.dtype)
    bounds = graphs.lora_linear(
        inputs.x, inputs.weight, inputs.a, inputs.b, 2.0, None, inputs.dy, None, 0.0, rules
    )
    bound = getattr(bounds, name)
    # a sixteenth of the LoRA part where S and dS are stored in 8 bits, a thousandth in fp32
    assert float(bound.radius.median() / bound.value.abs().median()) <= most


def test_lora_linear_graph_agrees_with_the_oracle():
    for case in ordered("linear", ("fp32", "bf16"), 5)[:20]:
        inputs = case.inputs()
        a, b = inputs.a.to(inputs.x.dtype), inputs.b.to(inputs.x.dtype)
        scale = oracle.linear.scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        keep = (
            oracle.keep_mask(inputs.seed, inputs.tokens, case.k, case.dropout)
            if case.dropout
            else None
        )
        bounds = graphs.lora_linear(
            inputs.x, inputs.weight, a, b, scale, None, inputs.dy, keep, case.dropout,
            Roundings.fused(inputs.x.dtype),
        )  # fmt: skip
        y = oracle.lora_linear_forward(
            inputs.x, inputs.weight, a, b, scale, keep=keep, p=case.dropout
        )
        grads = oracle.lora_linear_backward(
            inputs.dy, inputs.x, inputs.weight, a, b, scale, keep=keep, p=case.dropout
        )
        values = {"y": y, "dx": grads.dx, "da": grads.da, "db": grads.db}
        for name, value in values.items():
            bound = getattr(bounds, name)
            # tolerance-rule: two float64 orders of one sum differ by 2 gamma_n, 2^-28 of an fp32
            # radius
            assert bool(((value - bound.value).abs() <= 2.0**-20 * bound.radius).all())


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.float64])
def test_adamw_bound_holds_and_catches_a_wrong_rate(arithmetic):
    hyper = oracle.Hyper(lr=1e-2, weight_decay=0.01)
    start = draw(64, 9).float()
    own = torch.nn.Parameter(start.clone().to(arithmetic))
    optimizer = torch.optim.AdamW([own], lr=hyper.lr, weight_decay=hyper.weight_decay)
    bounds = AdamWBounds(exact(start), hyper, torch.float32)
    reference = oracle.AdamWOracle({"p": start}, hyper)
    for step in range(6):
        gradient = draw(64, 9, seed=step).float()
        own.grad = gradient.to(arithmetic)
        optimizer.step()
        bound = around(reference.step({"p": gradient})["p"], bounds.step(gradient, 1.0))
        assert judge(own.float(), bound).share <= 1
    wrong = start + (own.detach().float() - start) * (1 + 2.0**-10)
    assert judge(wrong, bound).share > 3
