"""From rows to micro-batches: an epoch's order, names of samples, cuts of a batch, one stream.

Nothing here may let a row's place in a file or in a batch reach the arithmetic: a sample's id comes
from its content, and a stream keeps every document in a span of its own that starts at a multiple
of the alignment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastlora.data import IGNORED, Row
from fastlora.errors import InputError
from fastlora.ops.linear_cross_entropy import Supervised, supervised
from fastlora.stream import Stream, signed, splitmix64, splitmix64_words

# A valid id of every vocabulary. Padding is never supervised and comes after the row in causal
# order.
PADDING_ID = 0


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward over one stream of T tokens, each row padded to a multiple of the alignment.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], from 0 inside each document.
        labels: int64 [T], shifted: position t holds the token to be predicted there, or -100.
        stream: where the documents lie.
        supervised: labels that are not -100.
        lines: line number of each document in its file.
        chosen: the supervised rows, on the tensors' device.
        weights: of each document's loss, or None where all are 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    stream: Stream
    supervised: int
    lines: tuple[int, ...]
    chosen: Supervised
    weights: tuple[float, ...] | None = None

    def as_logged(self) -> dict:
        """What the log says of it; ``files`` where the data set has several."""
        files = [getattr(line, "file", "") for line in self.lines]
        return {"sample_ids": [f"{i:016x}" for i in self.stream.sample_ids], "lines": [int(line) for line in self.lines],
                **({"files": files} if any(files) else {}), "tokens": sum(self.stream.lengths),
                "padded_tokens": self.stream.total, "supervised_tokens": self.supervised}


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of ``n`` rows in an epoch, int64 [n]: a permutation by (seed, epoch), or the file's.

    Rows are sorted by a splitmix64 hash of (seed, epoch, index): no random generator whose stream
    may change from one library version to the next.
    """
    if not shuffle:
        return np.arange(n)
    base = splitmix64(splitmix64(seed & (2**64 - 1)) ^ epoch)
    hashes = splitmix64_words(splitmix64_words(torch.arange(n)) ^ signed(base))
    # Sorted as unsigned numbers, equal ones by index.
    return np.argsort(hashes.numpy().view(np.uint64), kind="stable")


class Batches:
    """Which rows make up each global batch: epochs one after the other, the last batch of each shorter if the rows do not
    divide. Holds one epoch's order, 8 bytes a row.

    Args:
        n: rows. size: sequences a batch. seed, shuffle: see :func:`epoch_order`.
    """

    def __init__(self, n: int, size: int, seed: int, shuffle: bool) -> None:
        self.n, self.size, self.seed, self.shuffle = n, size, seed, shuffle
        self.in_epoch = -(-n // size)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both counted from 1."""
        return (step - 1) // self.in_epoch + 1

    def of(self, step: int) -> list[int]:
        """Places of the rows of ``step``, counted from 1."""
        epoch, place = divmod(step - 1, self.in_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.n, self.seed, epoch, self.shuffle)
        return self._order[place * self.size : (place + 1) * self.size].tolist()


def sample_ids(rows: Sequence[Row]) -> tuple[int, ...]:
    """A 63-bit id a row of a global batch: its content's key, mixed with its number among equals.

    Equal rows may be swapped by another order of the batch; they take the same ids in another
    order, and being equal, the sums over them are the same.
    """
    seen: Counter[int] = Counter()
    ids = []
    for row in rows:
        ids.append(splitmix64(row.key ^ splitmix64(seen[row.key])) >> 1)
        seen[row.key] += 1
    return tuple(ids)


def padded_length(length: int, alignment: int) -> int:
    """``length`` rounded up to a multiple of ``alignment`` tokens."""
    return -(-length // alignment) * alignment


def plan(rows: Sequence[Row], micro_batch_tokens: int | None, alignment: int) -> list[list[int]]:
    """Cut a global batch into micro-batches of at most ``micro_batch_tokens`` padded tokens.

    First fit over the rows from long to short: the longest go first, so that a shortage of memory
        shows at the start
    of a step. None puts all rows into one micro-batch.

    Returns:
        Indices into ``rows`` for each micro-batch; each index exactly once.

    Raises:
        InputError: a single row, padded, is longer than ``micro_batch_tokens``.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    if micro_batch_tokens is None:
        return [order] if order else []
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        need = padded_length(len(rows[index]), alignment)
        if need > micro_batch_tokens:
            raise InputError(
                f"micro_batch_tokens is {micro_batch_tokens}, and line {rows[index].line} takes {need} tokens"
                f" ({len(rows[index])}, padded to a multiple of {alignment}); give at least {need}"
            )
        place = next((i for i, free in enumerate(room) if free >= need), None)
        if place is None:
            bins.append([])
            room.append(micro_batch_tokens)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= need
    return bins


def fill_ratio(lengths: Iterable[int], alignment: int) -> float:
    """Real tokens over padded tokens; 1.0 when there are none. Takes numbers, or arrays of them."""
    real = padded = 0
    for length in lengths:
        real += int(np.sum(length))
        padded += int(np.sum(padded_length(length, alignment)))
    return real / padded if padded else 1.0


def collate(
    rows: Sequence[Row],
    sample_ids: Sequence[int],
    alignment: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    step: int = 0,
) -> MicroBatch:
    """Lay rows one after the other into one stream.

    Args:
        rows: the micro-batch's rows, at least one.
        sample_ids: their ids, from :func:`sample_ids` of the whole global batch.
        alignment: see ``stream.alignment_for``.
        device: where the tensors go.
        seed, step: for dropout.

    Raises:
        InputError: no row, or not one id a row.
    """
    if not rows:
        raise InputError("rows is empty; a micro-batch has at least one row")
    stream = Stream(tuple(len(row) for row in rows), alignment, tuple(sample_ids), seed, step)
    ids = np.full(stream.total, PADDING_ID, dtype=np.int64)
    labels = np.full(stream.total, IGNORED, dtype=np.int64)
    for row, (start, _) in zip(rows, stream.spans):
        ids[start : start + len(row)] = row.input_ids
        # Token t predicts token t + 1 of its own document; the last one predicts nothing.
        labels[start : start + len(row) - 1] = row.labels[1:]
    # Found here, where labels are on the host: finding them on a GPU would wait for it in the middle of a step.
    chosen = supervised(torch.from_numpy(labels), stream.spans)
    return MicroBatch(
        input_ids=torch.from_numpy(ids).to(device)[None],
        position_ids=stream.positions(device)[None],
        labels=torch.from_numpy(labels).to(device),
        stream=stream,
        supervised=sum(chosen.counts),
        chosen=chosen.to(device),
        lines=tuple(row.line for row in rows),
        weights=tuple(row.weight for row in rows) if any(row.weight != 1 for row in rows) else None,
    )


def supervised_weight(rows: Sequence[Row]) -> int | float:
    """What the summed loss of a global batch is divided by: supervised tokens, each times its row's weight; the correctly
    rounded sum, in any order."""
    if all(row.weight == 1 for row in rows):
        return sum(row.supervised for row in rows)
    return math.fsum(row.weight * row.supervised for row in rows)
