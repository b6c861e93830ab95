"""Weights of training rows: a row counts ``weight`` times, exactly, however the batch is cut.

    loss = sum over rows of w_i (sum of the row's token losses) / sum over rows of w_i n_i

with n_i supervised tokens in row i. The numerator's gradient is the plain one with the rows of dh (the gradient at the last hidden
state) multiplied by w_i: token by token, so nothing but dA and dB sums over tokens still. The denominator is divided by once, by
the optimiser.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch

from fastlora.encode import RowError
from fastlora.stream import Stream, by_rows

FIELD = "weight"
# Far from what fixed point holds of a gradient at either end; rows that matter less are better left out.
LEAST, MOST = 2.0**-20, 2.0**20


def weight_of(record: object) -> float:
    """The weight that a parsed row asks for by its field ``weight``; 1 without.

    Raises:
        RowError: no number, or out of range.
    """
    given = record.get(FIELD, 1.0) if isinstance(record, dict) else 1.0
    good = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    if not good or not LEAST <= given <= MOST:
        raise RowError("bad_format", f"'{FIELD}' is {given!r}; allowed is a number from 2**-20 to 2**20 (leave out a row that "
                       "shall not count)")
    return float(given)


def name_of(weight: float) -> bytes:
    """What a weight adds to the content that a row's key is a hash of: nothing for 1, so that plain rows keep their names."""
    return b"" if weight == 1 else struct.pack("<d", weight)


class _WeighGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, factors):
        ctx.save_for_backward(factors)
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (factors,) = ctx.saved_tensors
        # In fp32, rounded once to the gradient's dtype.
        return (dy.float() * factors).to(dy.dtype), None


def by_row(stream: Stream, weights: Sequence[float], device: torch.device) -> torch.Tensor:
    """fp32 [T]: the weight of each row's document."""
    return by_rows(np.array(weights, np.float32), stream.spans).to(device)


def weigh_gradient(hidden: torch.Tensor, stream: Stream, weights: Sequence[float]) -> torch.Tensor:
    """``hidden`` [T, H] as it is; in the backward each row of its gradient times the weight of its document.

    The weights are rounded to fp32, the product once more to the gradient's dtype.
    """
    return _WeighGradient.apply(hidden, by_row(stream, weights, hidden.device)[:, None])
