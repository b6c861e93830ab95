"""Dropout without a state: a mask from a counter, the same on every device and for every split.

    counter = (token low, token high, feature // 8, 0)
    word    = Philox4x32-7(key = seed, counter)[(feature % 8) // 2]
    half    = word & 0xFFFF for an even feature, word >> 16 for an odd one
    t       = round(p * 2^16)
    keep    = half >= t                        D(x) = x * keep * (2^16 / (2^16 - t))

So p is rounded to a multiple of 2^-16, and D keeps the mean of that one exactly. The Triton kernels
draw the same words, bit for bit. The token's counter names its sample and
position (``Stream.token_keys``), the seed mixes run, step and module (:func:`module_key`), so a
mask depends neither on the split nor on the order of injection.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from fastlora.dropout_rate import STEPS, allowed
from fastlora.errors import InputError
from fastlora.stream import splitmix64

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
ALLOWED = "0, or from 2^-16 to 1 - 2^-16 (it is rounded to a multiple of 2^-16)"


@dataclass(frozen=True)
class DropoutKey:
    """What names every random word of one dropout: ``seed`` (63 bits) and ``tokens`` (int64 [M], a
    counter a row).
    """

    seed: int
    tokens: torch.Tensor

    def rows(self, start: int, stop: int) -> DropoutKey:
        """The key of rows ``start`` to ``stop``."""
        return DropoutKey(self.seed, self.tokens[start:stop])


def module_key(seed: int, step: int, module_path: str) -> int:
    """A 63-bit seed from the run's seed, the optimiser step and the module's path (MD5, never a
    counter).
    """
    digest = hashlib.md5(module_path.encode(), usedforsecurity=False).digest()
    path = int.from_bytes(digest[:8], "little")
    mixed = splitmix64(seed & (1 << 64) - 1)
    mixed = splitmix64(mixed ^ (step & (1 << 64) - 1))
    return splitmix64(mixed ^ path) >> 1


def threshold(p: float) -> int:
    """t = round(p * 2^16): an element whose 16 bits are below it is dropped.

    Raises:
        InputError: ``p`` is neither 0 nor in [2^-16, 1 - 2^-16].
    """
    if not allowed(p):
        raise InputError(f"dropout is {p}; allowed: {ALLOWED}")
    return round(p * STEPS)


@functools.lru_cache(maxsize=64)
def keep_scale(p: float) -> float:
    """2^16 / (2^16 - t) rounded to fp32: what a kept element is multiplied by."""
    return float(np.float32(STEPS / (STEPS - threshold(p))))


def check_probability(p: float) -> None:
    """Raise InputError unless p is 0 or in [2^-16, 1 - 2^-16]."""
    threshold(p)


def philox(key: tuple[int, int], counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7 on int64 tensors that hold uint32 values; the four counters broadcast against
    each other.

    Returns four int64 tensors of uint32 values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two numbers below 2^32 fills 64 bits: int64 wraps, and its bits are the
        # right ones.
        first, second = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(key: DropoutKey, features: int, p: float) -> torch.Tensor:
    """bool [M, features]: True where the element is kept.

    Raises:
        InputError: ``p`` is not allowed, see :func:`threshold`.
    """
    least = threshold(p)
    tokens = key.tokens
    if p == 0.0:
        return torch.ones(tokens.shape[0], features, dtype=torch.bool, device=tokens.device)
    groups = torch.arange(-(-features // 8), device=tokens.device).unsqueeze(0)
    low, high = (tokens & _LOW).unsqueeze(1), ((tokens >> 32) & _LOW).unsqueeze(1)
    seed = (key.seed & _LOW, key.seed >> 32 & _LOW)
    words = philox(seed, (low, high, groups, torch.zeros_like(groups)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack([half >= least for half in torch.broadcast_tensors(*halves)], dim=-1)
    return kept.reshape(tokens.shape[0], -1)[:, :features]


def apply(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """D(x): one fp32 multiplication by :func:`keep_scale`, rounded once to ``x.dtype``."""
    return torch.where(keep, x.float() * keep_scale(p), 0.0).to(x.dtype)
