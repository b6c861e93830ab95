"""Exact gradient sums: integers have no order, so every cut of a batch gives the same bits.

A chunk's partial dA or dB (fp32) is rounded once to a 64-bit fixed-point number (one unit is 2**-40) and
added. Integer addition is associative and commutative: threads, atomics, micro-batches and an all-reduce
over processes (SUM) cannot change the result. Integer adds wrap, and a wrapped total looks like any other,
so the proof that none did is made beforehand: every total is bounded by largest |partial| x number of
chunks, and a step is refused unless that product is below 2**23 (= 2**63 units). Rounding cannot break the
bound: a partial of 2**-17 or more is already a whole number of units, and smaller ones would need 2**40
chunks. The fixed-point sum is the classic reproducible accumulator (Demmel and Nguyen 2013; Kulisch).
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from fastlora.errors import InputError, TrainingError

LSB_BITS = 40
LIMIT = 2.0**23  # 2**63 units of 2**-40: the first magnitude int64 cannot hold
SMALL = 2.0**-30  # below this a partial keeps under 10 bits, or none
NO_CHUNK = 2**62
WRONG_SCALE = -1  # in the place of a chunk: see TokenSum.add_early


class TokenSum:
    """The exact sum over tokens of one parameter's gradient.

    Attributes:
        total: int64 tensor of the parameter's shape, in units of 2**-40. Over processes: SUM.
        stats: int64[4] on the same device: the smallest index of a chunk with a non-finite partial
            (2**62: none; over processes MIN); the largest finite |partial| as the bits of an fp32 (MAX; the
            bits of non-negative floats order like integers); the count of finite non-zero partial elements
            (SUM); the count of those below 2**-30 (SUM).
        chunks: partials added so far (host int). Over processes: SUM.
        accepting: False refuses to add: the exact block of this sum has ended.
        pending: True between the end of an exact block and the optimiser step that uses it.
    """

    def __init__(self, shape: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
        self.stats = _empty_stats(self.total.device).clone()
        self.chunks = 0
        self.accepting = True
        self.pending = False
        self._used = False
        self._lock = threading.Lock()

    @classmethod
    def over(cls, total: torch.Tensor, stats: torch.Tensor) -> TokenSum:
        """A sum that lives in given int64 tensors: ``total`` of the parameter's shape and ``stats`` [4], both zeroed here."""
        made = cls.__new__(cls)
        made.total, made.stats, made._lock = total, stats, threading.Lock()
        made.chunks, made.accepting, made.pending, made._used = 0, True, False, True
        return made.zero_()

    def zero_(self) -> TokenSum:
        """Forget everything added; returns itself."""
        self._used = True
        zero_all([self])
        return self

    @torch.no_grad()
    def add_(self, partial: torch.Tensor, chunk: int) -> None:
        """Add one chunk's partial gradient, rounded to nearest even. Safe to call from several threads.

        A non-finite element is never converted (float to int is undefined there): it counts as 0 and sets the
        flag that makes :meth:`check` refuse the step. The same holds for one of 2**23 or more.

        Args:
            partial: fp32 tensor of the sum's shape, on its device.
            chunk: the caller's number of this chunk, named when it holds a non-finite element.

        Raises:
            InputError: another dtype or shape.
            TrainingError: the exact block of this sum has ended.
        """
        self._must_accept()
        if partial.dtype != torch.float32 or partial.shape != self.total.shape:
            raise InputError(
                f"partial: got {partial.dtype} {tuple(partial.shape)}; "
                f"allowed is torch.float32 {tuple(self.total.shape)}"
            )
        if partial.device.type == "cpu":
            self._add_host(partial.detach().numpy(), chunk)
        else:
            self._add_device(partial, chunk)

    def _add_host(self, partial: np.ndarray, chunk: int) -> None:
        # numpy takes a third of torch's time here, and always one thread
        magnitude = np.abs(partial)
        peak = magnitude.max()  # NaN wins a max, so this also tests for non-finite elements
        flagged = NO_CHUNK
        if not peak < LIMIT:
            finite = np.isfinite(partial)
            flagged = NO_CHUNK if finite.all() else chunk
            magnitude = np.where(finite, magnitude, np.float32(0))
            peak = magnitude.max()
            partial = np.where(finite & (magnitude < LIMIT), partial, np.float32(0))
        # The product is exact in float64 (a power of two), so rint is the only rounding: half to even.
        units = np.multiply(partial, 2.0**LSB_BITS, dtype=np.float64)
        units = np.rint(units, out=units).astype(np.int64)
        filled = np.count_nonzero(magnitude != 0)
        small = np.count_nonzero(magnitude < SMALL) - (magnitude.size - filled)
        total, stats = self.total.numpy(), self.stats.numpy()
        with self._lock:
            np.add(total, units, out=total)
            stats[0] = min(stats[0], flagged)
            stats[1] = max(stats[1], peak.view(np.int32))
            stats[2] += filled
            stats[3] += small
            self.chunks += 1

    def _add_device(self, partial: torch.Tensor, chunk: int) -> None:
        # The masks are always applied: asking whether they are needed would wait for the device.
        magnitude = partial.abs()
        finite = magnitude <= torch.finfo(torch.float32).max
        magnitude = torch.where(finite, magnitude, 0.0)
        partial = torch.where(finite & (magnitude < LIMIT), partial, 0.0)
        units = partial.double().mul_(2.0**LSB_BITS).round_().long()
        filled = torch.count_nonzero(magnitude)
        small = torch.count_nonzero(magnitude < SMALL) - (magnitude.numel() - filled)
        with self._lock:
            self.total += units
            self.stats[0] = torch.minimum(self.stats[0], torch.where(finite.all(), NO_CHUNK, chunk))
            self.stats[1] = torch.maximum(self.stats[1], magnitude.max().view(torch.int32).long())
            self.stats[2] += filled
            self.stats[3] += small
            self.chunks += 1

    def count(self, n_chunks: int) -> int:
        """Note that a kernel adds ``n_chunks`` partials to ``total`` and ``stats`` by itself; the number of the first of them.

        Raises:
            TrainingError: the exact block of this sum has ended.
        """
        self._must_accept()
        with self._lock:
            first = self.chunks
            self.chunks += int(n_chunks)
        return first

    def merge_(self, other: TokenSum, into: torch.Tensor | None = None) -> TokenSum:
        """Add another sum (what an all-reduce does: SUM, MIN, MAX, SUM); returns itself.

        Args:
            other: of the same shape, or of that of ``into``. into: a view of ``total`` that takes it; None: all of it.
        """
        self._used = True
        into = self.total if into is None else into
        with self._lock:
            into += other.total.to(into.device)
            theirs = other.stats.to(self.stats.device)
            self.stats[0] = torch.minimum(self.stats[0], theirs[0])
            self.stats[1] = torch.maximum(self.stats[1], theirs[1])
            self.stats[2:] += theirs[2:]
            self.chunks += other.chunks
        return self

    @torch.no_grad()
    def add_early(self, early: TokenSum, upstream: torch.Tensor, expected: float) -> None:
        """Add, in a backward, what its forward summed already.

        Integers can no longer be scaled: the forward was told by what its loss would be multiplied. That this came true is
        tested where ``upstream`` lies, without a wait, and :meth:`check` tells.

        Args:
            early: of the same shape. upstream: scalar tensor, the gradient of the loss. expected: what it has to be.

        Raises:
            TrainingError: the exact block of this sum has ended.
        """
        self._must_accept()
        broken = torch.where(upstream.isfinite(), WRONG_SCALE, 0)
        flag = torch.where(upstream == expected, NO_CHUNK, broken).to(early.stats.device)
        early.stats[0] = torch.minimum(early.stats[0], flag)
        self.merge_(early)

    def adding(self) -> contextlib.AbstractContextManager[TokenSum]:
        """Where a backward adds its partials: this sum itself. See :class:`SumSlice`."""
        return contextlib.nullcontext(self)

    def check(self, name: str) -> None:
        """Refuse a sum that is not exact.

        Raises:
            TrainingError: a partial was NaN or infinite, or largest |partial| x chunks reached 2**23; the
                message names ``name``.
        """
        check_all([(name, self)])

    def gradient(self, divisor: float) -> torch.Tensor:
        """The gradient as fp32: float64(total) x 2**-40 / divisor, then one rounding to fp32.

        Args:
            divisor: the global batch's supervised tokens, times the gradient scale. Positive.
        """
        return units_to_gradient(self.total, divisor)

    @property
    def underflow_share(self) -> float:
        """The share of non-zero partial elements that became 0 or kept under 10 bits (0..1)."""
        filled, small = self.stats[2:].tolist()
        return small / filled if filled else 0.0

    def _must_accept(self) -> None:
        if not self.accepting:
            raise TrainingError(
                "a backward pass reached exact sums whose block has ended: "
                "run forward and backward inside `with fastlora.exact(model):`"
            )
        self._used = True


class SumSlice:
    """A part of a :class:`TokenSum`, such as the rows of one expert's A, that a backward adds to as to a sum of its own.

    The part exists while a backward adds (from the forward on it would fill the memory) and is contiguous, as kernels want it.

    Args:
        whole: the sum. view: from a tensor of its shape to the part.
    """

    def __init__(self, whole: TokenSum, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.whole, self.view = whole, view

    @contextlib.contextmanager
    def adding(self) -> Iterator[TokenSum]:
        """A sum of the part's shape, which goes into the whole at the end of the block.

        Raises:
            TrainingError: the exact block of the whole has ended.
        """
        self.whole._must_accept()
        into = self.view(self.whole.total)
        part = TokenSum(into.shape, into.device)
        yield part
        self.whole.merge_(part, into)


def units_to_gradient(total: torch.Tensor, divisor: float) -> torch.Tensor:
    """int64 units of any shape -> fp32 gradient (see :meth:`TokenSum.gradient`)."""
    if not 0 < divisor < float("inf"):
        raise InputError(f"divisor: got {divisor!r}; allowed is a positive finite number")
    # A divisor on the device: CUDA turns division by a host scalar into a product with its reciprocal.
    by = torch.full((), float(divisor), dtype=torch.float64, device=total.device)
    return total.double().mul_(2.0**-LSB_BITS).div_(by).float()


def zero_all(sums: list[TokenSum]) -> None:
    """Zero many sums with a few launches; those that nothing was added to are zero already."""
    sums = [s for s in sums if s._used]
    if not sums:
        return
    torch._foreach_zero_([s.total for s in sums])
    torch._foreach_copy_([s.stats for s in sums], [_empty_stats(s.stats.device) for s in sums])
    for s in sums:
        s.chunks, s._used = 0, False


@functools.cache
def _empty_stats(device: torch.device) -> torch.Tensor:
    return torch.tensor([NO_CHUNK, 0, 0, 0], dtype=torch.int64, device=device)


def read_stats(sums: list[TokenSum]) -> list[list[int]]:
    """``stats`` of every sum as host ints, with one copy (one wait) per device."""
    rows: list[list[int]] = [[] for _ in sums]
    for device in {s.stats.device for s in sums}:
        places = [i for i, s in enumerate(sums) if s.stats.device == device]
        for i, row in zip(places, torch.stack([sums[i].stats for i in places]).tolist(), strict=True):
            rows[i] = row
    return rows


def check_all(named: list[tuple[str, TokenSum]]) -> list[list[int]]:
    """:meth:`TokenSum.check` for many sums with one wait per device; returns their stats as host ints."""
    rows = read_stats([s for _, s in named])
    for (name, s), (chunk, bits, _, _) in zip(named, rows, strict=True):
        if chunk == WRONG_SCALE:
            raise TrainingError(
                f"{name}: its exact sums are made in the forward of the loss, which was then multiplied by another number than its "
                "gradient_scale: call backward on the loss itself, or give gradient_scale to the loss"
            )
        if chunk != NO_CHUNK:
            raise TrainingError(f"{name}: the gradient is NaN or infinite (first in chunk {chunk})")
        (peak,) = struct.unpack("<f", struct.pack("<i", bits))
        if peak * s.chunks >= LIMIT:
            raise TrainingError(
                f"{name}: the exact gradient sum may overflow (largest partial {peak:.6g} x "
                f"{s.chunks} chunks; allowed is below {LIMIT:.0f}): lower gradient_scale"
            )
    return rows
