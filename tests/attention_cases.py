"""Attention cases that the interpreter's and the GPU's tests share, and their float64 answer."""

from __future__ import annotations

import torch

# query heads, key heads, head width, value width, document lengths (padded), window, soft-cap
CASES = [
    (2, 1, 32, 32, (64, 192, 128), None, None),
    (6, 2, 16, 16, (128, 64), 40, None),
    (3, 1, 64, 64, (192,), None, 5.0),
    (2, 2, 24, 40, (64, 128), 100, 20.0),
]


def name(case) -> str:
    heads, kv, d, e, lengths, window, cap = case
    return f"h{heads}-kv{kv}-d{d}-e{e}-{'+'.join(map(str, lengths))}-w{window}-cap{cap}"


def spans_of(lengths) -> tuple[tuple[int, int], ...]:
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    return tuple(spans)


def draw(case, dtype, device, seed=0):
    """q, k, v [1, H, T, width] and dout [1, T, H, E]."""
    heads, kv, d, e, lengths, *_ = case
    g = torch.Generator(device).manual_seed(seed)
    total = sum(lengths)
    shapes = (1, heads, total, d), (1, kv, total, d), (1, kv, total, e), (1, total, heads, e)
    return [torch.randn(*s, generator=g, device=device).to(dtype) for s in shapes]


def oracle(q, k, v, dout, spans, scale, window, cap):
    """out, dq, dk, dv in float64, a document at a time, by the textbook formula and autograd."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    outs = []
    for start, stop in spans:
        a, b, c = (t[0, :, start:stop] for t in (q, k, v))
        b, c = b.repeat_interleave(groups, 0), c.repeat_interleave(groups, 0)
        s = a @ b.transpose(1, 2) * scale
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        i = torch.arange(stop - start, device=q.device)
        hidden = i[None, :] > i[:, None]
        if window is not None:
            hidden |= i[:, None] - i[None, :] >= window
        outs.append((torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ c).transpose(0, 1))
    out = torch.cat(outs)[None]
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def worst_share(ours, exact, unit, terms):
    """Largest error over a bound of ``terms`` roundings of the tensor's own scale (P, S and dS are rounded to the dtype)."""
    scale = exact.abs().max().item()
    return (ours.double() - exact).abs().max().item() / (terms * unit * scale)
