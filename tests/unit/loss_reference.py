"""The loss in float64 with torch's own cross-entropy, and what fp32 arithmetic may lose on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.unit.rounding import UNIT, gamma


class Reference(NamedTuple):
    """Loss (summed) and gradient [M, H] in float64, each with the bound of its rounding errors."""

    loss: float
    gradient: torch.Tensor
    loss_bound: float
    gradient_bound: torch.Tensor


def reference(hidden, weight, labels, *, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0) -> Reference:
    """:class:`Reference` of ``linear_cross_entropy``, whose arguments these are; -100 is ignored.

    A logit is off by ``off``: a dot product of H terms, soft-cap and scale. A row's normaliser is off by that and by
    ``own``, the sum of V exponentials and the logarithm; so is the mean over the vocabulary, a sum of V terms. A row's
    loss adds normaliser, label and mean with weights 1, 1 - e and e, and the z-loss with slope 2 k |normaliser|. In the
    gradient every probability is off by twice ``off`` and its sums, relative to itself, and the z-loss's factor by 2 k
    times the normaliser's error; the soft-cap's slope by 2 off / c. Then comes a product over V.
    """
    count, (size, width) = int((labels != -100).sum()), weight.shape
    h, w = hidden.detach().double().requires_grad_(), weight.double()
    z = h @ w.t()
    z = logit_scale * (softcap * torch.tanh(z / softcap) if softcap else z)
    chosen = labels != -100
    normalizer = torch.logsumexp(z[chosen], 1)
    loss = torch.nn.functional.cross_entropy(z[chosen], labels[chosen], reduction="sum", label_smoothing=label_smoothing)
    loss = loss + z_loss * normalizer.square().sum()
    loss.backward()
    z, normalizer = z.detach(), normalizer.detach()
    most, top = float(z.abs().max()), float(normalizer.abs().max())
    off = gamma(width + 8) * (float((h.detach().abs() @ w.abs().t()).max()) + most)
    own = gamma(size + 20) * (most + torch.tensor(float(size)).log().item() + 2)
    slope = 2 * z_loss * top
    row = (2 + slope) * off + (1 + label_smoothing + slope) * own + gamma(8) * z_loss * top**2
    p = torch.softmax(z[chosen], 1)
    target = (1 - label_smoothing) * torch.nn.functional.one_hot(labels[chosen], size) + label_smoothing / size
    share = 2 * off * (2 + 2 / (softcap or 1)) + gamma(2 * size + 30)
    lost = torch.zeros_like(h.grad)
    lost[chosen] = logit_scale * (share * ((1 + slope) * p + target) + 2 * z_loss * (off + own) * p) @ w.abs()
    lost += UNIT[hidden.dtype] * h.grad.abs() * 1.01
    return Reference(float(loss.detach()), h.grad, count * row, lost)
