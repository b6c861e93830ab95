"""Attention by document: right to rounding, free of neighbours, and clear about what it lacks."""

from __future__ import annotations

import pytest
import torch
from rounding import gamma, within
from torch import nn

from fastlora import stream
from fastlora.errors import InputError
from fastlora.ops import attention as op

SCALE = 0.3


def heads(length, seed, q_heads=4, kv_heads=2, width=16, value_width=16):
    g = torch.Generator().manual_seed(seed)
    shapes = ((q_heads, width), (kv_heads, width), (kv_heads, value_width), (q_heads, value_width))
    return [torch.randn(1, length, *shape, generator=g) for shape in shapes]


def run(parts, lengths, window=None, softcap=None):
    """Output and the three gradients, [T, heads, width] each, of documents side by side."""
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    q, k, v, dout = (torch.cat([p[i] for p in parts], 1) for i in range(4))
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    views = [x.transpose(1, 2) for x in (q, k, v)]
    out = op.attention(*views, tuple(spans), SCALE, window, softcap)
    out.backward(dout)
    return [x[0] for x in (out.detach(), q.grad, k.grad, v.grad)]


def oracle(part, window, softcap):
    """The same in float64, and a bound an element.

    S is off by at most gamma(D + 8) * |q||k| * scale, so P by twice that, relatively; what follows
    adds the losses of its own sums. ``reach`` bounds |dS| with every term taken as positive.
    """
    q, k, v, dout = (x[0].double().transpose(0, 1) for x in part)
    groups = q.shape[0] // k.shape[0]
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    kk, vv = (x.repeat_interleave(groups, 0) for x in (k, v))
    s = SCALE * q @ kk.transpose(1, 2)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    place = torch.arange(q.shape[1])
    ahead = place[None] - place[:, None]
    hidden = (ahead > 0) | (ahead <= -(window or 10**9))
    p = torch.softmax(s.masked_fill(hidden, -torch.inf), -1)
    out = p @ vv
    out.backward(dout)
    with torch.no_grad():
        length, width = q.shape[1], q.shape[2]
        off = gamma(width + 8) * float((SCALE * q.abs() @ kk.abs().transpose(1, 2)).max())
        off += gamma(8) * float(s.abs().max())
        # 2 for P, 2 for the slope of the soft-cap, 2 for S met again in the backward; sums after.
        share = 6 * off * (1 + 1 / (softcap or 1)) + gamma(2 * length + 2 * width + 40)
        cross = p * (dout.abs() @ vv.abs().transpose(1, 2))
        reach = SCALE * (cross + p * cross.sum(-1, keepdim=True))
        fold = (-1, groups, length)
        bounds = [
            p @ vv.abs(),
            reach @ kk.abs(),
            (reach.transpose(1, 2) @ q.abs()).view(*fold, width).sum(1),
            (p.transpose(1, 2) @ dout.abs()).view(*fold, vv.shape[2]).sum(1),
        ]
    wanted = [x.transpose(0, 1) for x in (out.detach(), q.grad, k.grad, v.grad)]
    return wanted, [share * x.transpose(0, 1) for x in bounds]


@pytest.mark.parametrize(
    ("window", "softcap", "value_width"),
    [
        (None, None, 16),
        (None, None, 8),
        (40, None, 16),
        (None, 5.0, 16),
        (16, 3.0, 16),
        (500, None, 16),
    ],
)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_attention_within_rounding_of_float64(window, softcap, value_width, q_heads, kv_heads):
    lengths = (32, 208)
    parts = [heads(n, n, q_heads, kv_heads, 16, value_width) for n in lengths]
    found = run(parts, lengths, window, softcap)
    start = 0
    for part, length in zip(parts, lengths):
        wanted, bounds = oracle(part, window, softcap)
        for name, one, two, bound in zip(("out", "dq", "dk", "dv"), found, wanted, bounds):
            # tolerance-rule: the bound is derived in oracle()
            assert within(one[start : start + length], two, bound), name
        start += length


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (48, None), (None, 4.0)])
def test_attention_bits_do_not_depend_on_neighbours_or_threads(window, softcap):
    lengths = (160, 16, 304)
    parts = [heads(n, n, 6, 2) for n in lengths]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [run([part], [n], window, softcap) for part, n in zip(parts, lengths)]
        for order in ((0, 1, 2), (2, 0, 1)):
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found = run([parts[i] for i in order], [lengths[i] for i in order], window, softcap)
                start = 0
                for i in order:
                    rows = slice(start, start + lengths[i])
                    assert all(torch.equal(one[rows], two) for one, two in zip(found, alone[i]))
                    start += lengths[i]
    finally:
        torch.set_num_threads(before)


def test_attention_never_looks_past_the_document_or_ahead():
    parts, lengths = [heads(48, 1), heads(64, 2)], (48, 64)
    plain = run(parts, lengths)[0]
    parts[1][1][:, 32:], parts[1][2][:, 32:] = 9.0, 9.0
    changed = run(parts, lengths)[0]
    assert torch.equal(plain[:80], changed[:80])
    assert not torch.equal(plain[80:], changed[80:])


def made(length=16):
    return stream.Stream((length,), 16, (1,))


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.ones(1, 1, 16, 16)}, "attention_mask"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_forward_refuses_by_name(keywords, named):
    q, k, v, _ = (x.transpose(1, 2) for x in heads(16, 0))
    keywords = {"attention_mask": None, **keywords}
    with stream.use(made()), pytest.raises(InputError, match=named):
        op.attention_forward(nn.Identity(), q, k, v, **keywords)


def test_attention_refuses_a_length_that_is_not_the_stream():
    q, k, v, _ = (x.transpose(1, 2) for x in heads(32, 0))
    with stream.use(made()), pytest.raises(InputError, match="tokens"):
        op.attention_forward(nn.Identity(), q, k, v, None)


def test_attention_forward_softcap_without_a_stream_is_the_same_attention():
    part = heads(32, 0)
    q, k, v, _ = (x.transpose(1, 2) for x in part)
    found, _ = op.attention_forward(nn.Identity(), q, k, v, None, scaling=SCALE, softcap=4.0)
    wanted, bounds = oracle(part, None, 4.0)
    # tolerance-rule: the bound is derived in oracle()
    assert within(found[0], wanted[0], bounds[0])


def test_attention_mask_is_none_only_under_a_stream():
    keywords = {"batch_size": 1, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": False}
    assert op.attention_mask(**keywords).shape == (1, 1, 4, 4)
    with stream.use(made()):
        assert op.attention_mask(**keywords) is None
