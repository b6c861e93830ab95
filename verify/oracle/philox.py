"""Counter-based dropout masks: Philox4x32-7 in numpy, written from the paper.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
known-answer vectors of its Random123 distribution are in ``tests/meta/test_oracle.py``.
"""

from __future__ import annotations

import numpy as np
import torch

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """Four uint32 words (in uint64) for each counter; ``counter`` is [..., 4], below 2**32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1)


def keep_mask(seed: int, tokens: torch.Tensor, features: int, p: float) -> torch.Tensor:
    """The mask [M, features] (bool, True = kept) for a 63-bit seed and int64 token keys [M].

    Key: the low and the high word of the seed. Counter: (token low, token high, feature // 8, 0).
    The four output words are eight numbers of 16 bits, each word's low half first. Feature f is
    kept if number f % 8 is at least 2^16 times :func:`rate`.
    """
    keys = tokens.detach().cpu().numpy().astype(np.int64).view(np.uint64)
    groups = (features + 7) // 8
    counter = np.zeros((keys.size, groups, 4), dtype=np.uint64)
    counter[..., 0] = (keys & _LOW)[:, None]
    counter[..., 1] = (keys >> _HALF)[:, None]
    counter[..., 2] = np.arange(groups, dtype=np.uint64)[None, :]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    # little-endian: the low half of a word lies first
    numbers = words.astype("<u4").view("<u2").reshape(keys.size, groups * 8)[:, :features]
    return torch.from_numpy(np.ascontiguousarray(numbers.astype(np.float64) >= 65536 * rate(p)))


def rate(p: float) -> float:
    """The probability that is meant by ``p``: the nearest multiple of 2^-16, ties to the even one."""
    return round(p * 65536) / 65536
