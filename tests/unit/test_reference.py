"""The torch reference of the LoRA linear: right to rounding, and free of neighbours and threads."""

from __future__ import annotations

import pytest
import torch
from rounding import UNIT, gamma, within

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import dropout as dropout_op
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.reference import aligned, backward_ref, forward_ref
from fastlora.token_sum import TokenSum

SCALE = 0.5


def problem(rows, inner=40, outer=24, rank=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(rows, width, generator=g).to(dtype) for width in (inner, outer))
    weight = torch.randn(outer, inner, generator=g).to(dtype)
    a, b = torch.randn(rank, inner, generator=g), torch.randn(outer, rank, generator=g)
    return x, dy, weight, a, b, torch.randn(outer, generator=g).to(dtype)


def oracle(x, dy, weight, a, b, bias, keep, p):
    """Results in float64 and, for each, the sum of |terms| that rounding is relative to."""
    dtype = x.dtype
    d = dropout_op.apply(x, keep, p).double() if p else x.double()
    x, dy, w, bias = (t.double() for t in (x, dy, weight, bias))
    a, b = a.to(dtype).double(), b.to(dtype).double()
    back = keep.double() / (1 - p) if p else 1.0

    def results(d, x, dy, w, a, b, bias):
        s, ds = SCALE * d @ a.t(), SCALE * dy @ b
        return {
            "s": s,
            "y": x @ w.t() + s @ b.t() + bias,
            "dx": dy @ w + back * (ds @ a),
            "da": ds.t() @ d,
            "db": dy.t() @ s,
        }

    exact = results(d, x, dy, w, a, b, bias)
    return exact, results(*(t.abs() for t in (d, x, dy, w, a, b, bias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 7, 128, 300])
def test_reference_within_rounding_of_float64(rows, p, dtype):
    x, dy, weight, a, b, bias = problem(rows, dtype=dtype)
    key = DropoutKey(5, torch.arange(rows))
    keep = dropout_op.keep_mask(key, x.shape[1], p)
    y, s = forward_ref(x, weight, a, b, SCALE, bias, p, key)
    dx, da, db = backward_ref(dy, x, weight, a, b, s, SCALE, p, key)
    exact, size = oracle(x, dy, weight, a, b, bias, keep, p)
    # Two chained fp32 products, and one rounding to the dtype in S or dS and one in the result.
    share = gamma(rows + x.shape[1] + dy.shape[1] + 20) + 2.1 * UNIT[dtype]
    for name, found in (("y", y), ("s", s), ("dx", dx), ("da", da), ("db", db)):
        # tolerance-rule: every term carries at most ``share`` of its own size
        assert within(found, exact[name], share * size[name]), name
    assert (y.dtype, s.dtype, dx.dtype) == (dtype,) * 3
    assert (da.dtype, db.dtype) == (torch.float32,) * 2


def test_backward_ref_drops_what_the_forward_dropped():
    x, dy, weight, a, b, _ = problem(32)
    key = DropoutKey(5, torch.arange(32))
    keep = dropout_op.keep_mask(key, x.shape[1], 0.5)
    weight = torch.zeros_like(weight)
    _, s = forward_ref(x, weight, a, b, SCALE, None, 0.5, key)
    dx, _, _ = backward_ref(dy, x, weight, a, b, s, SCALE, 0.5, key)
    assert torch.equal(dx == 0, ~keep)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_reference_rows_and_sums_do_not_depend_on_neighbours_or_threads(p):
    lengths, names = (300, 17, 130), (11, 12, 13)
    documents = [problem(n, 192, 96, seed=n)[:2] for n in (304, 32, 144)]
    _, _, weight, a, b, bias = problem(1, 192, 96)
    before = torch.get_num_threads()

    def run(cut, threads):
        torch.set_num_threads(threads)
        sums, rows = (TokenSum(a.shape), TokenSum(b.shape)), {}
        for part in cut:
            made = stream.Stream(tuple(lengths[i] for i in part), 16, tuple(names[i] for i in part))
            x, dy = (torch.cat([documents[i][j] for i in part]) for j in (0, 1))
            with stream.use(made):
                key = DropoutKey(9, made.token_keys())
                y, s = forward_ref(x, weight, a, b, SCALE, bias, p, key)
                dx, da, db = backward_ref(
                    dy, x, weight, a, b, s, SCALE, p, key, sums_a=sums[0], sums_b=sums[1]
                )
            assert da is None
            assert db is None
            for i, (start, stop) in zip(part, made.spans):
                rows[i] = torch.cat([t[start:stop] for t in (y, s, dx)], 1)
        return [rows[i] for i in range(3)] + [total.total for total in sums]

    try:
        wanted = run([(0, 1, 2)], 1)
        for cut in ([(0,), (1,), (2,)], [(2, 0), (1,)], [(1, 2, 0)]):
            for threads in (1, 2, 4):
                found = run(cut, threads)
                assert all(torch.equal(one, two) for one, two in zip(found, wanted))
    finally:
        torch.set_num_threads(before)


def test_backward_ref_without_dx():
    x, dy, weight, a, b, _ = problem(20)
    _, s = forward_ref(x, weight, a, b, SCALE)
    dx, da, _ = backward_ref(dy, x, weight, a, b, s, SCALE, needs_dx=False)
    assert dx is None
    assert torch.equal(da, backward_ref(dy, x, weight, a, b, s, SCALE)[1])


def test_reference_takes_no_rows():
    x, dy, weight, a, b, bias = problem(0)
    y, s = forward_ref(x, weight, a, b, SCALE, bias)
    dx, da, db = backward_ref(dy, x, weight, a, b, s, SCALE)
    assert (y.shape, s.shape, dx.shape) == ((0, 24), (0, 6), (0, 40))
    assert not da.any()
    assert not db.any()


def test_reference_strided_inputs_have_the_same_bits():
    x, dy, weight, a, b, bias = problem(64)
    wide = torch.zeros(64, 83)
    wide[:, 1::2][:, :40] = x
    y, s = forward_ref(x, weight, a, b, SCALE, bias)
    assert torch.equal(forward_ref(wide[:, 1::2][:, :40], weight, a, b, SCALE, bias)[0], y)
    one = backward_ref(dy, x, weight, a, b, s, SCALE)
    two = backward_ref(dy.t().contiguous().t(), x, weight, a, b, s, SCALE)
    assert all(torch.equal(left, right) for left, right in zip(one, two))


def test_aligned_copies_only_what_begins_inside_a_line():
    base = torch.arange(64.0)
    assert aligned(base) is base
    moved = aligned(base[1:])
    assert moved.data_ptr() % 64 == 0
    assert torch.equal(moved, base[1:])


@pytest.mark.parametrize("key", [None, DropoutKey(1, torch.arange(3))])
def test_forward_ref_needs_a_key_of_its_rows(key):
    x, _, weight, a, b, _ = problem(4)
    with pytest.raises(InputError, match="key"):
        forward_ref(x, weight, a, b, SCALE, None, 0.1, key)
