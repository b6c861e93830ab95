"""Tokenized rows: one, many of them read by index from flat arrays (in memory, or mapped from a file), and their making.

The arrays: token ids int32 [T], which of them are supervised uint8 [T], and a record a row (``INDEX``).
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastlora import weights
from fastlora.encode import RowError
from fastlora.sources import Line

IGNORED = -100
# end: one past the row's last token in the flat arrays; number and begin: see sources.Line; file: its place in the list.
INDEX = np.dtype([("end", "<i8"), ("key", "<i8"), ("number", "<i8"), ("begin", "<i8"), ("file", "<i4"),
                  ("weight", "<f8")])
IDS, MASK = np.dtype("<i4"), np.dtype("u1")


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenized row.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n], not shifted: a supervised token's label is the token itself, others are
            -100. The first token has no predecessor to be predicted from and is never supervised.
        line: the line of the file it came from, counted from 1 (a :class:`fastlora.sources.Line` knows the file too).
        format: one of ``encode.FORMATS``.
        key: 63-bit hash of ids and labels: rows of equal content have equal keys, wherever they
            stand. A weight other than 1 is part of the content.
        weight: by which the loss of each of the row's tokens is multiplied.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    line: int
    format: str
    key: int
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORED).sum())


def make_row(ids: list[int], supervised: list[bool], line: int, kind: str, weight: float = 1.0) -> Row:
    """A :class:`Row` of ``ids`` and the mask of supervised tokens.

    Raises:
        RowError: no token after the first is supervised.
    """
    input_ids = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(supervised, dtype=bool), input_ids, np.int32(IGNORED)).astype(np.int32)
    labels[:1] = IGNORED
    if not (labels != IGNORED).any():
        raise RowError("no_supervised_token", "no supervised token")
    # Fixed byte order and width: the key names the row on every machine.
    content = input_ids.astype("<i4").tobytes() + labels.astype("<i4").tobytes()
    content += weights.name_of(weight)
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
    return Row(input_ids, labels, line, kind, key, weight)


class TokenRows(Sequence):
    """Rows read one by one from flat arrays. Reading a row copies that row and touches nothing else.

    Args:
        ids: int32 [T]. mask: uint8 [T], 1 where supervised. index: ``INDEX`` records [n].
        format: one of ``encode.FORMATS``. files: names to put behind a line number, or () for a single file.
    """

    def __init__(self, ids: np.ndarray, mask: np.ndarray, index: np.ndarray, format: str, files: Sequence[str] = ()) -> None:
        self.ids, self.mask, self.index, self.format, self.files = ids, mask, index, format, tuple(files)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        start = int(self.index["end"][place - 1]) if place else 0
        entry = self.index[place]
        ids = np.array(self.ids[start : entry["end"]], dtype=np.int32)
        labels = np.where(self.mask[start : entry["end"]] != 0, ids, np.int32(IGNORED)).astype(np.int32)
        return Row(ids, labels, self.line(place), self.format, int(entry["key"]), float(entry["weight"]))

    def line(self, place: int) -> Line:
        """Where row ``place`` came from."""
        entry = self.index[place]
        return Line(int(entry["number"]), int(entry["begin"]), self.files[entry["file"]] if self.files else "")

    def blocks(self, size: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first, lengths int64) of the rows, ``size`` at a time."""
        for start in range(0, len(self), size):
            ends = self.index["end"][start : start + size]
            before = int(self.index["end"][start - 1]) if start else 0
            yield start, np.diff(ends, prepend=before)


def lengths(rows: Sequence[Row]) -> Iterator[np.ndarray]:
    """Lengths of all rows, in blocks of int64, without holding the rows."""
    if isinstance(rows, TokenRows):
        yield from (block for _, block in rows.blocks())
    else:
        yield np.array([len(row) for row in rows], dtype=np.int64)


def longest(rows: Sequence[Row]) -> int:
    """The place of the longest row, the first of equals; -1 if there is none."""
    best, place, start = -1, -1, 0
    for block in lengths(rows):
        if len(block) and int(block.max()) > best:
            best, place = int(block.max()), start + int(block.argmax())
        start += len(block)
    return place


def largest_token(rows: Sequence[Row]) -> tuple[int, int]:
    """(the largest token id, place of the first row that holds it); (-1, -1) without rows."""
    if not isinstance(rows, TokenRows):
        found = [int(row.input_ids.max()) for row in rows]
        return (max(found), found.index(max(found))) if found else (-1, -1)
    best, at, size = -1, -1, 1 << 20
    for start in range(0, len(rows.ids), size):
        block = rows.ids[start : start + size]
        if int(block.max()) > best:
            best, at = int(block.max()), start + int(block.argmax())
    return best, int(np.searchsorted(rows.index["end"], at, side="right")) if at >= 0 else -1


def keys(rows: Sequence[Row]) -> Iterator[bytes]:
    """The rows' keys as little-endian 64-bit words, in blocks."""
    if isinstance(rows, TokenRows):
        for start in range(0, len(rows), 1 << 16):
            yield np.ascontiguousarray(rows.index["key"][start : start + (1 << 16)]).astype("<i8").tobytes()
    else:
        yield b"".join(row.key.to_bytes(8, "little") for row in rows)


class Store:
    """Where rows are gathered: memory, or three files of a folder, written as they come.

    Args:
        folder: an empty folder, or None for memory.
    """

    NAMES = ("ids.bin", "mask.bin", "index.bin")

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self.folder, self.tokens = folder, 0
        self._parts: list[list[np.ndarray]] = [[], [], []]
        self._files = [(folder / name).open("wb") for name in self.NAMES] if folder else None

    def add(self, ids: np.ndarray, mask: np.ndarray, index: np.ndarray) -> None:
        """Append rows; ``index["end"]`` counts from the first of these tokens.

        Raises:
            OSError: the disk is full.
        """
        index = index.copy()
        index["end"] += self.tokens
        self.tokens += len(ids)
        for place, part in enumerate((ids, mask, index)):
            if self._files:
                part.tofile(self._files[place])
            else:
                self._parts[place].append(part)

    def close(self) -> None:
        """Flush and close the files."""
        for file in self._files or ():
            file.close()

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, mask and index of what was gathered in memory."""
        empty = [np.zeros(0, kind) for kind in (IDS, MASK, INDEX)]
        return tuple(np.concatenate(parts or [none]) for parts, none in zip(self._parts, empty))


def mapped(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, mask and index of a folder that a :class:`Store` wrote, mapped and not read.

    Raises:
        OSError, ValueError: a file is missing or has no whole number of elements.
    """
    return tuple(np.memmap(folder / name, dtype=kind, mode="r") for name, kind in zip(Store.NAMES, (IDS, MASK, INDEX)))
