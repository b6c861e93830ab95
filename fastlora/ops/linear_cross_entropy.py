"""Head and loss in one operation: the sum of token losses over the supervised rows, and its
gradient.

    z = f(h W^T)       f(z) = logit_scale * c tanh(z / c), without c: logit_scale * z
    l = log sum exp z
    loss = sum over supervised rows of (l - (1 - e) z[label] - e mean(z) + k l^2)
    dh = (f'(..) ((1 + 2 k l) softmax(z) - (1 - e) onehot(label) - e / V)) W

e is label smoothing as torch and transformers mean it, (1 - e) of the label's -log p and e of the
mean of -log p over the vocabulary (Szegedy et al., "Rethinking the Inception Architecture", 2016,
section 7); k is the coefficient of the z-loss, which holds the normaliser near 1 (Chowdhery et al.,
"PaLM", 2022, section 5, with 1e-4; Zoph et al., "ST-MoE", 2022). Both are 0 by default and then
cost nothing.

With LoRA on the head (``lora``) z is f(h W^T + s D(h) A^T B^T), and the exact token sums of dA and dB are
made by the same tiles: ops/head_lora.py.

Only supervised rows are computed. They are gathered a document at a time and cut into fixed tiles,
so a row's bits depend on its document alone. A tile's logits live only while it is computed; the
gradient of the sum is made in the forward and scaled in the backward. Row losses are rounded to
int64 fixed point (one unit is 2^-40) and added as integers, which have no order. The optimiser
divides, once, by the global batch's supervised tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fastlora import blocks, stream
from fastlora.errors import InputError
from fastlora.ops import backend, head_lora, lora_linear
from fastlora.ops.head_lora import HeadCall, HeadLora, HeadTile

IGNORED = -100
LOSS_UNIT = 2.0**-40
# Logits of a tile: 64 x 49,152 in fp32 are 12.6 MB; products of 64 rows run at full speed.
TILE_ROWS = {"cpu": 64, "cuda": 2048}
# Rows of a 16-bit head that are held in fp32 at a time.
VOCAB_ROWS = 8192


class Terms(NamedTuple):
    """What is added up for a row; the letters c, e and k of this file's head."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Supervised(NamedTuple):
    """The supervised rows of a batch, found once.

    Attributes:
        rows: int64 [n], where they are. labels: int64 [n], the token each predicts. owner: int64 [n], the number of its document.
        counts: supervised rows of each document. smallest, largest: of the labels; 0 and -1 without one.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    counts: tuple[int, ...]
    smallest: int
    largest: int

    def to(self, device: torch.device | str) -> Supervised:
        """The same on another device."""
        return self._replace(rows=self.rows.to(device), labels=self.labels.to(device), owner=self.owner.to(device))


def supervised(labels: torch.Tensor, spans: tuple[tuple[int, int], ...]) -> Supervised:
    """The rows whose label counts. Reads ``labels`` on the host: give it the ones that are there, or it waits for the device.

    Args:
        labels: integers [M], already shifted; -100 is ignored.
        spans: (start, stop) of each document.
    """
    host = labels.detach().cpu().numpy()  # by numpy: see stream.by_rows
    rows = np.flatnonzero(host != IGNORED)
    chosen = host[rows].astype(np.int64)
    owner = np.searchsorted([stop for _, stop in spans], rows, side="right")
    counts = np.bincount(owner, minlength=len(spans)).tolist()
    smallest, largest = (int(chosen.min()), int(chosen.max())) if chosen.size else (0, -1)
    return Supervised(*map(torch.from_numpy, (rows, chosen, owner)), tuple(counts), smallest, largest).to(labels.device)


@dataclass
class LossRecord:
    """What a loss was made of, for logs and for naming a sequence whose loss is not finite.

    Attributes:
        total: int64 scalar, the exact sum in units of 2^-40: add these over micro-batches. Rows whose
            loss is not finite count 0.
        documents: float64 [documents]: the loss sum of each document of the stream, NaN where a row
            of it is not finite. Without a stream the whole batch is one document.
        supervised: supervised tokens of each document.
    """

    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    documents: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    supervised: tuple[int, ...] = ()

    @property
    def units(self) -> int:
        """:attr:`total` on the host."""
        return int(self.total)

    @property
    def not_finite(self) -> list[int]:
        """Indices of documents whose loss is not finite."""
        return torch.nonzero(~self.documents.isfinite()).flatten().tolist()


def _spans(rows: int) -> tuple[tuple[int, int], ...]:
    current = stream.active()
    if current is not None and current.total == rows:
        return current.spans
    return ((0, rows),)


def _step(device: str) -> int:
    """Rows of a tile."""
    return TILE_ROWS.get(device, TILE_ROWS["cuda"])


def _cut(counts: tuple[int, ...], device: str) -> list[tuple[int, int]]:
    """Tiles over the gathered rows; on CPU none crosses a document."""
    return head_lora.by_document(counts if device == "cpu" else (sum(counts),), _step(device))


@functools.lru_cache(maxsize=64)
def _vocabulary(size: int) -> tuple[slice, ...]:
    return tuple(slice(low, min(low + VOCAB_ROWS, size)) for low in range(0, size, VOCAB_ROWS))


def _tile(h, weight, labels, terms, want_grad, lora: HeadTile | None = None):
    """(row losses fp32 [n], gradient [n, H] or None) of one tile."""
    if backend.pick(h) == "triton":
        run = _tile_triton if lora is None else lora.run_triton
        return run(h, weight, labels, terms, want_grad)
    softcap, logit_scale, smoothing, z_loss = terms
    h32 = h.float()
    z = h32.new_empty(h.shape[0], weight.shape[0])
    for part in _vocabulary(weight.shape[0]):
        torch.mm(h32, weight[part].float().t(), out=z[:, part])
    if lora is not None:
        lora.add_logits(z, h)
    capped = None
    if softcap is not None:
        capped = z.mul_(1.0 / softcap).tanh_()
        z = capped * (softcap * logit_scale)
    elif logit_scale != 1.0:
        z.mul_(logit_scale)
    index = labels.unsqueeze(1)
    target = z.gather(1, index)
    mean = z.mean(1, keepdim=True) if smoothing else None
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    normalizer = total.log().add_(top)
    losses = normalizer - target
    if smoothing:
        losses.add_((target - mean).mul_(smoothing))
    if z_loss:
        losses.add_(normalizer.square().mul_(z_loss))
    losses = losses.squeeze(1)
    if not want_grad:
        return losses, None
    z.div_(total)
    if z_loss:
        z.mul_(normalizer.mul_(2.0 * z_loss).add_(1.0))
    if smoothing:
        z.sub_(smoothing / z.shape[1])
    z.scatter_add_(1, index, torch.full_like(target, smoothing - 1.0))
    if capped is not None:
        z.mul_(capped.square_().neg_().add_(1.0))
    if lora is not None:
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        lora.take_gradient(z)
        if not lora.call.needs_dh:
            return losses, None
    grad = torch.zeros_like(h32)
    for part in _vocabulary(weight.shape[0]):
        grad.addmm_(z[:, part], weight[part].float())
    if lora is not None:
        lora.add_dh(grad)
    elif logit_scale != 1.0:
        grad.mul_(logit_scale)
    return losses, grad


def _tile_triton(h, weight, labels, terms, want_grad):
    """The same by Triton kernels, whose rows do not depend on their number: logits in h's dtype,
    the gradient in their place."""
    from fastlora.kernels.cross_entropy import cross_entropy_
    from fastlora.kernels.gemm import gemm

    logits = gemm(h, weight, transposed=True)
    losses = cross_entropy_(logits, labels, gradient=want_grad, **terms._asdict())
    return losses, gemm(logits, weight, transposed=False) if want_grad else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, labels, tiles, terms, losses, call, a, b):
        # a and b are there to have gradients: what computes with them is the call, which has tiles of its own
        want_grad, found = any(ctx.needs_input_grad), losses
        h = hidden.index_select(0, rows)
        if call is not None:
            h, labels = call.spread(h), call.spread(labels)
            found = losses.new_empty(h.shape[0])
            if want_grad:
                call.begin(ctx.needs_input_grad[0])
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None

        def tile(item: tuple[int, int]) -> None:
            part = slice(*item)
            # A copy: the rows of a document begin anywhere in h, and alignment must not depend on
            # it.
            lora = None if call is None else call.tile(item)
            row_losses, g = _tile(h[part].clone(), weight, labels[part], terms, want_grad, lora)
            found[part] = row_losses
            if grad is not None:
                grad[part] = g

        for group in [tiles] if call is None else call.groups():
            if hidden.device.type == "cpu" and backend.pick(hidden) != "triton":
                blocks.run(tile, group)
            else:
                for item in group:
                    tile(item)
            if call is not None:
                call.settle()
        if call is not None:
            losses.copy_(call.gather(found))
            grad = None if grad is None else call.gather(grad)
        ctx.save_for_backward(rows, grad)
        ctx.shape, ctx.call = hidden.shape, call
        # The caller makes the exact sum; this scalar only carries the gradient.
        return losses.new_zeros((), dtype=torch.float64)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        rows, grad = ctx.saved_tensors
        dhidden, gradients, factor = None, (None, None), upstream
        if ctx.call is not None:
            gradients, factor = ctx.call.finish(upstream), upstream / ctx.call.lora.gradient_scale
        if grad is not None:
            scaled = grad.float().mul_(factor.float()).to(grad.dtype)
            dhidden = grad.new_zeros(ctx.shape).index_copy_(0, rows, scaled)
        return dhidden, *(None,) * 7, *gradients


def _check(hidden, weight, labels, terms, lora) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: allowed: [M, H], [V, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise InputError(f"labels {tuple(labels.shape)}: one for each of {hidden.shape[0]} rows")
    if weight.requires_grad:
        raise InputError("weight: requires_grad is True; the head must be frozen")
    if lora is not None:
        lora_linear.check(hidden, weight, lora.a, lora.b, None, lora.dropout, lora.key)
        head_lora.check(lora, hidden.shape[0])
    softcap, _, smoothing, z_loss = terms
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap is {softcap}; it must be above 0, or None")
    if not 0 <= smoothing < 1:
        raise InputError(f"label_smoothing is {smoothing}; allowed is from 0 to below 1")
    if not 0 <= z_loss < math.inf:
        raise InputError(f"z_loss is {z_loss}; allowed is a finite number of 0 or more")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    record: LossRecord | None = None,
    chosen: Supervised | None = None,
    lora: HeadLora | None = None,
) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of ``hidden @ weight.T`` over supervised rows, with label smoothing
    and z-loss if asked for.

    Args:
        hidden: [M, H], any float dtype; the gradient goes here.
        weight: [V, H], the frozen head.
        labels: integers [M], already shifted (row t holds the token after t); -100 is ignored.
        softcap: c of c tanh(z / c), applied before ``logit_scale``; None: none.
        logit_scale: multiplies the logits.
        label_smoothing: e: a row's loss is (1 - e) of the label's -log p and e of the mean of -log p
            over the vocabulary; from 0 to below 1.
        z_loss: k: every supervised row adds k (log sum exp of its logits)^2; 0 or more. Smoothing and
            z-loss see the logits after soft-cap and scale, as the softmax does.
        record: filled with the exact sum and each document's share.
        chosen: what :func:`supervised` found in these labels, if that is known already.
        lora: an adapter on the head, or None; ``hidden`` then has the head's dtype.

    Returns:
        (float64 scalar, the SUM of the losses with a gradient to ``hidden`` and the adapter; supervised rows).
        The sum is NaN if any row's loss is not finite.

    Raises:
        InputError: shapes that do not agree, a label outside the vocabulary, a head that is not
            frozen, a soft-cap that is not positive, a smoothing or z-loss out of range, an
            adapter that does not fit, or ``chosen`` of another stream.
    """
    terms = Terms(softcap, logit_scale, label_smoothing, z_loss)
    _check(hidden, weight, labels, terms, lora)
    spans = _spans(hidden.shape[0])
    if chosen is None:
        chosen = supervised(labels, spans)
    rows, owner, counts = chosen.rows, chosen.owner, chosen.counts
    if len(counts) != len(spans):
        raise InputError(f"chosen: was found in {len(counts)} documents; allowed are the {len(spans)} of the stream in use")
    if not 0 <= chosen.smallest <= chosen.largest + 1 <= weight.shape[0]:
        raise InputError(
            f"labels hold {chosen.smallest} to {chosen.largest}; "
            f"allowed are {IGNORED} and 0 to {weight.shape[0] - 1}"
        )
    losses = torch.empty(rows.shape[0], dtype=torch.float32, device=hidden.device)
    tiles = call = a = b = None
    if lora is None:
        tiles = _cut(counts, hidden.device.type)
    else:
        step = _step("cuda" if backend.pick(hidden) == "triton" else hidden.device.type)
        call, a, b = HeadCall(lora, hidden, rows, owner, counts, step), lora.a, lora.b
    carrier = _LinearCrossEntropy.apply(
        hidden, weight.detach(), rows, chosen.labels, tiles, terms, losses, call, a, b
    )
    finite = losses.isfinite()
    fixed = torch.where(finite, losses, 0.0).double().mul_(1.0 / LOSS_UNIT).round_().long()
    units = torch.zeros(len(spans), dtype=torch.int64, device=rows.device)
    units.index_add_(0, owner, fixed)
    broken = torch.zeros_like(units).index_add_(0, owner, (~finite).long()) > 0
    total = units.sum().double() * LOSS_UNIT
    total = torch.where(broken.any(), float("nan"), total)
    if record is not None:
        record.total = units.sum()
        record.documents = torch.where(broken, float("nan"), units.double() * LOSS_UNIT)
        record.supervised = counts
    return carrier + total, rows.shape[0]
