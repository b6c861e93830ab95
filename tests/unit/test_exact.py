"""Exact sums: rounding, order, flags, the saturation test, and the block that collects them."""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
import torch
from lora_standin import StandInModel

import fastlora
from fastlora.errors import InputError, TrainingError
from fastlora.exact import LSB_BITS, NO_CHUNK, TokenSum, _hooks, discard, exact, lora_modules

UNIT = 2.0**-LSB_BITS


def draws(count: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """fp32 partials of very different magnitudes, where float sums depend on the order."""
    g = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-9, 4, (count,), generator=g)
    return [torch.randn(shape, generator=g) * s for s in scales]


def summed(partials: list[torch.Tensor]) -> TokenSum:
    s = TokenSum(partials[0].shape, "cpu")
    for i, p in enumerate(partials):
        s.add_(p, i)
    return s


@pytest.mark.parametrize("value, units", [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2)])
def test_add_rounds_to_nearest_even(value: float, units: int) -> None:
    assert summed([torch.tensor([value * UNIT])]).total.item() == units


def test_add_equals_rational_arithmetic() -> None:
    partials = draws(20, (5,))
    want = [sum(round(Fraction(p[i].item()) * 2**LSB_BITS) for p in partials) for i in range(5)]
    assert summed(partials).total.tolist() == want


def test_add_has_no_order_where_float_sums_do() -> None:
    partials = draws(40, (17,))
    forward, backward = summed(partials), summed(partials[::-1])
    assert torch.equal(forward.total, backward.total)
    assert forward.stats.tolist() == backward.stats.tolist()
    floats = sum(partials), sum(partials[::-1])
    assert not torch.equal(*floats), "the control must differ, or this test shows nothing"


def test_add_is_safe_from_threads() -> None:
    partials = draws(64, (33,))
    want, s = summed(partials), TokenSum((33,), "cpu")

    def work(start: int) -> None:
        for i in range(start, 64, 4):
            s.add_(partials[i], i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(s.total, want.total)
    assert (s.chunks, s.stats.tolist()) == (64, want.stats.tolist())


def test_count_tells_the_number_of_the_first_chunk() -> None:
    total = TokenSum((2, 2))
    assert [total.count(3), total.count(2), total.chunks] == [0, 3, 5]


def test_merge_equals_one_sum_over_everything() -> None:
    partials = draws(12, (6,))
    partials[9][2] = float("nan")
    one = summed(partials)
    parts = TokenSum((6,), "cpu"), TokenSum((6,), "cpu")
    for i, p in enumerate(partials):
        parts[i % 2].add_(p, i)
    merged = parts[0].merge_(parts[1])
    assert torch.equal(merged.total, one.total)
    assert (merged.chunks, merged.stats.tolist()) == (12, one.stats.tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_never_converted_and_names_the_first_chunk(bad: float) -> None:
    s = TokenSum((2,), "cpu")
    s.add_(torch.tensor([1.0, 2.0]), 0)
    s.add_(torch.tensor([bad, 4.0]), 7)
    s.add_(torch.tensor([1.0, bad]), 3)
    assert s.total.tolist() == [2 * 2**40, 6 * 2**40]
    assert s.stats[0].item() == 3
    with pytest.raises(TrainingError, match=r"layers\.0\.q_proj.*chunk 3"):
        s.check("layers.0.q_proj")


def test_add_of_a_device_equals_that_of_the_host() -> None:
    """The path for other devices is plain torch, so it also runs here."""
    partials = [*draws(20, (33, 7)), torch.full((33, 7), 2.0**23), torch.zeros(33, 7)]
    partials[4][1, 1], partials[9][2, 2] = float("nan"), -float("inf")
    host, device = summed(partials), TokenSum((33, 7), "cpu")
    for i, p in enumerate(partials):
        device._add_device(p, i)
    assert torch.equal(host.total, device.total)
    assert host.stats.tolist() == device.stats.tolist()
    assert host.stats[0].item() == 4


def test_check_bounds_largest_partial_times_chunks() -> None:
    s = TokenSum((1,), "cpu")
    below = torch.nextafter(torch.tensor([2.0**22]), torch.tensor([0.0]))
    s.add_(below, 0)
    s.add_(-below, 1)
    s.check("m")  # 2 * below < 2**23
    s.count(1)
    with pytest.raises(TrainingError, match="m: .*overflow"):
        s.check("m")


def test_check_bound_is_tight_and_sound() -> None:
    s = TokenSum((1,), "cpu")
    for i in range(8):
        s.add_(torch.tensor([2.0**20 - 1]), i)
    s.check("m")
    assert s.total.item() == 8 * (2**20 - 1) * 2**40  # the largest sums allowed do not wrap


def test_wrapped_sum_looks_ordinary_and_check_refuses_it() -> None:
    s = summed([torch.tensor([2.0**22])] * 4)
    assert s.total.item() == 0  # wrapped to a harmless-looking value
    with pytest.raises(TrainingError, match="overflow"):
        s.check("m")


def test_too_large_partial_is_not_converted() -> None:
    s = summed([torch.tensor([2.0**23, 1.0]), torch.tensor([3e38, 1.0])])
    assert s.total.tolist() == [0, 2 * 2**40]
    assert s.stats[0].item() == NO_CHUNK
    with pytest.raises(TrainingError, match="overflow"):
        s.check("m")


def test_underflow_share_counts_partials_under_ten_bits() -> None:
    edge = 2.0**-30
    below = edge * (1 - 2.0**-24)
    s = summed([torch.tensor([0.0, edge, below, -1e-20, 1.0])])
    assert s.stats[2:].tolist() == [4, 2]
    assert s.underflow_share == 0.5
    assert TokenSum((1,), "cpu").underflow_share == 0.0


def test_gradient_is_rounded_once() -> None:
    s = TokenSum((3,), "cpu")
    s.total.copy_(torch.tensor([3 * 2**40, -(2**41), 12345]))
    want = [3 / 7, -2 / 7, 12345 * UNIT / 7]
    assert s.gradient(7).tolist() == torch.tensor(want, dtype=torch.float64).float().tolist()
    assert s.gradient(7).dtype == torch.float32


def test_gradient_refuses_a_bad_divisor() -> None:
    with pytest.raises(InputError, match="divisor: got 0"):
        TokenSum((1,), "cpu").gradient(0)


@pytest.mark.parametrize("partial", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_add_refuses_other_shapes_and_dtypes(partial: torch.Tensor) -> None:
    with pytest.raises(InputError, match="partial: got"):
        TokenSum((2,), "cpu").add_(partial, 0)


def test_exact_fills_sums_and_leaves_grad_none() -> None:
    model = StandInModel().fill_b()
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    with fastlora.exact(model):
        model(x).sum().backward()
        model(x)  # a forward alone adds nothing
    module = model.q_proj
    assert module.lora_A.weight.grad is None
    assert [s.chunks for s in module.sums] == [1, 1]
    assert all(s.pending and s.total.count_nonzero() > 0 for s in module.sums)
    assert not module.exact
    discard(model)
    assert not any(s.pending or s.total.any() for s in module.sums)


def test_exact_drops_unfinished_sums_on_an_error() -> None:
    model = StandInModel().fill_b()
    with pytest.raises(KeyError), exact(model):
        model(torch.ones(2, 12)).sum().backward()
        raise KeyError("stop")
    for _, m in lora_modules(model):
        assert not m.exact
        assert not any(s.pending or s.total.any() or s.chunks for s in m.sums)


def test_exact_refuses_a_backward_after_the_block() -> None:
    model = StandInModel()
    with exact(model):
        loss = model(torch.ones(2, 12)).sum()
    with pytest.raises(TrainingError, match="inside `with fastlora.exact"):
        loss.backward()
    discard(model)


def test_exact_refuses_nesting_and_unused_sums() -> None:
    model = StandInModel()
    with exact(model), pytest.raises(InputError, match="nested"), exact(model):
        pass
    with pytest.raises(InputError, match="all micro-batches of a step in one block"), exact(model):
        pass
    discard(model)
    with exact(model):
        pass
    discard(model)


def test_exact_needs_lora_linears() -> None:
    with pytest.raises(InputError, match="fastlora.inject"), exact(torch.nn.Linear(2, 2)):
        pass


def test_torch_optimiser_raises_while_sums_are_held() -> None:
    model, other = StandInModel(), torch.nn.Linear(2, 2)
    mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    with exact(model):
        with pytest.raises(InputError, match=r"SGD.*use fastlora\.AdamW"):
            mine.step()
        theirs.step()  # no parameter of an exact model: none of our business
    with pytest.raises(InputError, match=r"use fastlora\.AdamW"):
        mine.step()
    discard(model)
    mine.step()
    assert not _hooks, "the hook must go when no sums are held"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_sums_have_the_same_bits_on_cuda() -> None:
    partials = [*draws(20, (33, 7)), torch.full((33, 7), 2.0**23), torch.full((33, 7), -float("inf"))]
    here, there = summed(partials), TokenSum((33, 7), "cuda")
    for i, p in enumerate(partials):
        there.add_(p.cuda(), i)
    assert torch.equal(here.total, there.total.cpu())
    assert here.stats.tolist() == there.stats.tolist()
    assert torch.equal(here.gradient(7), there.gradient(7).cpu())
    assert there.zero_().stats.tolist() == [NO_CHUNK, 0, 0, 0]
