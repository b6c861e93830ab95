"""Which tokens one partial sum holds: a stream cut into chunks, none of which holds two documents.

A long chunk costs one conversion to integers for many tokens, and a document's chunks depend on its own length alone, so the sums
do not depend on what else is in the stream.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

import torch

# Tokens of one step of the sums. Documents are aligned to it on CUDA, and every chunk starts at a multiple.
UNIT = 64
# Longest chunk of a document of a stream, and of rows that are in no stream (which then may be cut at its multiples).
LONGEST, LONGEST_ALONE = 512, 128


def longest_of(tokens: int) -> int:
    """Longest chunk of a document of that many tokens. A chunk is one program's, so a document that is one chunk leaves many
    multiprocessors idle where it is alone."""
    return LONGEST if tokens > LONGEST else LONGEST // 2


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of ``rows`` tokens: how many, and where.

    Attributes:
        table: int32 [2, units + 2]: for each unit of 64 tokens the first unit at or after it that starts a chunk (``units`` at the
            end), and how many chunks start before it.
        ends: int8 [units + 1]: 1 for a unit that is the last of its chunk.
    """

    rows: int
    count: int
    table: torch.Tensor
    ends: torch.Tensor

    @property
    def units(self) -> int:
        """Steps of 64 tokens, the last perhaps shorter."""
        return -(-self.rows // UNIT)


@functools.lru_cache(maxsize=16)
def chunks_of(rows: int, spans: tuple[tuple[int, int], ...] | None, device: torch.device) -> Chunks:
    """The chunks of ``rows`` tokens on ``device``.

    Args:
        spans: (start, stop) of the documents that fill the rows; None, or documents that do not all start at a multiple of 64: fixed
            chunks from row 0 on.
    """
    longest = longest_of
    if spans is None or any(start % UNIT for start, _ in spans):
        spans, longest = ((0, rows),), lambda tokens: LONGEST_ALONE
    starts = [row // UNIT for start, stop in spans for row in range(start, stop, longest(stop - start))]
    units = -(-rows // UNIT)
    before = [bisect.bisect_left(starts, unit) for unit in range(units + 2)]
    following = [starts[place] if place < len(starts) else units for place in before]
    table = torch.tensor([following, before], dtype=torch.int32)
    ends = table[0, 1:] == torch.arange(1, units + 2, dtype=torch.int32)
    return Chunks(rows, len(starts), table.to(device), ends.to(torch.int8).to(device))
