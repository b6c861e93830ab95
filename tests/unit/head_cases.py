"""LoRA on the head in the fused loss: problems, and the same by torch's autograd in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora import stream
from fastlora.ops import dropout as dropout_op
from fastlora.ops.head_lora import HeadLora
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from fastlora.token_sum import TokenSum

# Label smoothing, z-loss, soft-cap and scale, alone and together.
TERMS = [
    {},
    {"softcap": 4.0, "logit_scale": 0.5},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 0.5},
]
SCALE, SEED = 1.5, 11


class Problem(NamedTuple):
    """hidden [M, H], weight [V, H], labels [M], A [r, H], B [V, r], keys of the tokens [M]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    tokens: torch.Tensor


def problem(rows, width=32, vocabulary=50, rank=4, seed=0, dtype=torch.float32, device="cpu") -> Problem:
    """A problem whose adapter is as large as its base; 40 % of the rows are not supervised."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.4] = -100
    weight, a, b = (
        torch.randn(*s, generator=fixed) * 0.3 for s in ((vocabulary, width), (rank, width), (vocabulary, rank))
    )
    b *= (4 / rank) ** 0.5
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    return Problem(*(t.to(device) for t in (hidden, weight.to(dtype), labels, a, b, torch.arange(rows) + 1000 * seed)))


class Found(NamedTuple):
    """Loss, its exact units, and gradients (those of A and B as fp32, whatever the mode)."""

    loss: float
    units: int
    dh: torch.Tensor | None
    da: torch.Tensor
    db: torch.Tensor


def run(
    p: Problem, *, dropout=0.0, exact=False, weights=None, gradient_scale=1.0, upstream=1.0, freeze=False, **terms
) -> Found:
    """The fused loss forward and backward; ``freeze``: the hidden state wants no gradient."""
    hidden = p.hidden.clone().requires_grad_(not freeze)
    a, b = (t.clone().requires_grad_() for t in (p.a, p.b))
    sums = (TokenSum(a.shape, a.device), TokenSum(b.shape, b.device)) if exact else None
    key = dropout_op.DropoutKey(SEED, p.tokens) if dropout else None
    record = LossRecord()
    lora = HeadLora(a, b, SCALE, dropout, key, sums, weights, gradient_scale)
    loss, _ = linear_cross_entropy(hidden, p.weight, p.labels, record=record, lora=lora, **terms)
    if exact:
        assert not any(s.total.any() for s in sums)  # a forward alone adds nothing
    (loss * upstream).backward()
    if exact:
        assert a.grad is None and b.grad is None
        for s in sums:
            s.check("lm_head")
        da, db = (s.gradient(1.0) for s in sums)
    else:
        da, db = a.grad, b.grad
    return Found(loss.item(), record.units, hidden.grad, da, db)


def truth(
    p: Problem, *, dropout=0.0, weights=None, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0
) -> Found:
    """:func:`run` by torch in float64; nothing of the operation but its mask."""
    h, w, a, b = (t.double() for t in (p.hidden, p.weight, p.a.to(p.hidden.dtype), p.b.to(p.hidden.dtype)))
    leaves = [t.detach().requires_grad_() for t in (h, a, b)]
    h, a, b = leaves
    x = h
    if dropout:
        keep = dropout_op.keep_mask(dropout_op.DropoutKey(SEED, p.tokens), h.shape[1], dropout)
        x = torch.where(keep, h / (1 - round(dropout * 65536) / 65536), 0.0)
    z = h @ w.t() + SCALE * (x @ a.t()) @ b.t()
    z = logit_scale * (softcap * torch.tanh(z / softcap) if softcap else z)
    kept = p.labels != -100
    rows = torch.nn.functional.cross_entropy(z[kept], p.labels[kept], reduction="none", label_smoothing=label_smoothing)
    rows = rows + z_loss * torch.logsumexp(z[kept], 1).square()
    (rows if weights is None else rows * weights.double()[kept]).sum().backward()
    return Found(rows.sum().item(), 0, *(t.grad for t in leaves))


def near(found: torch.Tensor, wanted: torch.Tensor, terms: int, unit: float = 2.0**-24) -> bool:
    """Whether a gradient's error, as a norm, is within ``terms`` roundings of ``unit``."""
    return float((found.double() - wanted).norm()) <= terms * unit * float(wanted.norm())


def units_and_totals(cuts, lengths, dropout=0.0, terms=None, alignment=16, **shape):
    """Exact sums and rows of dh for each way of cutting documents of ``lengths`` into streams: a list of what must be equal.

    cuts: a list of cuts, each a list of streams, each a list of documents' numbers. shape: for :func:`problem`.
    """
    made = []
    for cut in cuts:
        a, b = problem(1, **shape)[3:5]
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        sums, units, rows = (TokenSum(a.shape, a.device), TokenSum(b.shape, b.device)), 0, {}
        for part in cut:
            current = stream.Stream(tuple(lengths[i] for i in part), alignment, tuple(part), seed=SEED)
            documents = [problem(stop - start, seed=i, **shape) for i, (start, stop) in zip(part, current.spans)]
            hidden = torch.cat([d.hidden for d in documents]).requires_grad_()
            labels = torch.cat([d.labels for d in documents])
            key = dropout_op.DropoutKey(SEED, current.token_keys(a.device)) if dropout else None
            record = LossRecord()
            with stream.use(current):
                lora = HeadLora(a, b, SCALE, dropout, key, sums)
                loss, _ = linear_cross_entropy(
                    hidden, documents[0].weight, labels, record=record, lora=lora, **(terms or {})
                )
                loss.backward()
            units += record.units
            rows.update(zip(part, hidden.grad.split([stop - start for start, stop in current.spans])))
        made.append((units, [rows[i] for i in sorted(rows)], [s.total for s in sums], [s.chunks for s in sums]))
    return made


def same(made) -> bool:
    """Whether every cut gave the same bits."""
    (units, rows, totals, chunks), *others = made
    return all(
        units == u and chunks == c and all(map(torch.equal, rows, r)) and all(map(torch.equal, totals, t))
        for u, r, t, c in others
    )
