"""One micro-batch as one stream of tokens: where each document lies, how it is cut, what it is
called.

Everything the operations need to stay independent of the split is here: a document's span, its
fixed partition into tiles, its positions, and keys for dropout that name a token by its sample and
not by its place. All of it depends on the document alone (its length, its id and the alignment),
never on what else is in the stream.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastlora.errors import InputError

TILE_ROWS = 128

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def alignment_for(device_type: str) -> int:
    """Tokens to which every document is padded: 64 on CUDA (attention's block and the chunk of the token sums), else 16.

    16 rows of any width are a whole number of 64-byte lines, so on CPU every block of rows starts
    aligned whatever its place in the stream, and products and element-wise loops take the same path
    everywhere.
    """
    return 64 if device_type == "cuda" else 16


def splitmix64(value: int) -> int:
    """One step of splitmix64 (Steele, Lea, Flood 2014) on an unsigned 64-bit integer."""
    z = (value + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK64
    return z ^ (z >> 31)


def signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``value``."""
    return value - (1 << 64) if value >> 63 else value


def splitmix64_words(value: torch.Tensor) -> torch.Tensor:
    """:func:`splitmix64` on an int64 tensor that holds the bits of unsigned numbers."""

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
        # torch shifts int64 arithmetically; the mask drops the copies of the sign bit
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = value + signed(_GOLDEN)
    z = (z ^ shifted(z, 30)) * signed(_MIX1)
    z = (z ^ shifted(z, 27)) * signed(_MIX2)
    return z ^ shifted(z, 31)


@functools.lru_cache(maxsize=4096)
def _document_tiles(padded: int, rows: int) -> tuple[tuple[int, int], ...]:
    return tuple((low, min(low + rows, padded)) for low in range(0, padded, rows))


def by_rows(values: np.ndarray, spans: tuple[tuple[int, int], ...], rows: int = 1) -> torch.Tensor:
    """``values`` of documents [documents, ...], each again for every ``rows`` rows of its document: [T / rows, ...], on the host.

    By numpy: torch wakes all its threads for a table this small, which takes milliseconds of every step on many cores.
    """
    return torch.from_numpy(np.repeat(values, [(stop - start) // rows for start, stop in spans], axis=0))


@dataclass(frozen=True)
class Stream:
    """A 1-D stream of documents, each padded to a multiple of ``alignment`` tokens.

    Args:
        lengths: real tokens of each document, each at least 1.
        alignment: every document starts at a multiple of this (see :func:`alignment_for`).
        sample_ids: one non-negative 63-bit integer a document, naming its content (see
            ``packing.sample_ids``).
        seed: the run's seed, for dropout.
        step: the optimiser step, for dropout.

    Raises:
        InputError: a length below 1, an id out of range, or not one id a document.
    """

    lengths: tuple[int, ...]
    alignment: int
    sample_ids: tuple[int, ...]
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.alignment < 1:
            raise InputError(f"alignment is {self.alignment}; it must be at least 1")
        if len(self.sample_ids) != len(self.lengths):
            raise InputError(
                f"sample_ids has {len(self.sample_ids)} entries for {len(self.lengths)} documents; "
                "give one a document"
            )
        for length in self.lengths:
            if length < 1:
                raise InputError(f"lengths holds {length}; a document has at least 1 token")
        for sample in self.sample_ids:
            if not 0 <= sample < 1 << 63:
                raise InputError(f"sample_ids holds {sample}; ids are from 0 to 2^63 - 1")

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of every document, padding included."""
        spans, start = [], 0
        for length in self.lengths:
            stop = start + -(-length // self.alignment) * self.alignment
            spans.append((start, stop))
            start = stop
        return tuple(spans)

    @functools.cached_property
    def total(self) -> int:
        """Tokens of the whole stream, padding included."""
        return self.spans[-1][1] if self.lengths else 0

    def tiles(self, rows: int = TILE_ROWS) -> tuple[tuple[int, int], ...]:
        """(start, stop) of every tile: each document cut from its own start into ``rows`` rows, the
        last shorter.
        """
        return self._tiles.get(rows) or self._cut(rows)

    @functools.cached_property
    def _tiles(self) -> dict[int, tuple[tuple[int, int], ...]]:
        return {}

    def _cut(self, rows: int) -> tuple[tuple[int, int], ...]:
        self._tiles[rows] = tuple(
            (start + low, start + high)
            for start, stop in self.spans
            for low, high in _document_tiles(stop - start, rows)
        )
        return self._tiles[rows]

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [total]: 0, 1, 2, ... inside each document; padding goes on counting."""
        return self._on(device)[0]

    def token_keys(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [total]: splitmix64 of (sample id, position), the dropout counter of each token."""
        return self._on(device)[1]

    @functools.cached_property
    def chunks(self) -> dict:
        """The token sums' chunks of this stream by device, once the kernels have asked for them."""
        return {}

    @functools.cached_property
    def _device_cache(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def _on(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        name = str(device)
        if name not in self._device_cache:
            starts = by_rows(np.array([start for start, _ in self.spans], np.int64), self.spans)
            positions = torch.arange(self.total) - starts
            samples = by_rows(np.array(self.sample_ids, np.int64), self.spans)
            keys = splitmix64_words(splitmix64_words(samples) + positions)
            self._device_cache[name] = (positions.to(device), keys.to(device))
        return self._device_cache[name]


# One for the process, not one a thread: recomputation under checkpointing runs on autograd's own
# threads.
_active: list[Stream] = []


@contextlib.contextmanager
def use(stream: Stream) -> Iterator[Stream]:
    """Make ``stream`` the one that operations and attention see, forward and backward, until the
    block ends.
    """
    _active.append(stream)
    try:
        yield stream
    finally:
        _active.pop()


def active() -> Stream | None:
    """The stream in use, or None."""
    return _active[-1] if _active else None


def tiles(rows_total: int) -> tuple[tuple[int, int], ...]:
    """The fixed partition of ``rows_total`` rows: the active stream's tiles if its total is that,
    else blocks of 128.

    Rows are tokens. The blocks of 128 begin at row 0 and the last is shorter; 0 rows give no tile.
    """
    stream = active()
    if stream is not None and stream.total == rows_total:
        return stream.tiles()
    return _document_tiles(rows_total, TILE_ROWS)
