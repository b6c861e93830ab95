"""Which probabilities dropout takes: an element draws 16 bits, so all are multiples of 2^-16."""

from __future__ import annotations

STEPS = 1 << 16


def allowed(p: float) -> bool:
    """Whether p is 0, or in [2^-16, 1 - 2^-16]."""
    return p == 0 or 1 / STEPS <= p <= 1 - 1 / STEPS
