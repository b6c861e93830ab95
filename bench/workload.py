"""What a step is fed: full rows of 2,048 random tokens, or short rows of uneven lengths, for us and for peers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from bench.lengths import DEMO_ROWS, LIBRARY_ROWS
from fastlora.data import IGNORED, Row, make_row
from fastlora.packing import padded_length

FULL_ROW = 2048
LENGTHS = {"demo": DEMO_ROWS, "library": LIBRARY_ROWS}


def _row(length: int, supervised: int, vocabulary: int, line: int) -> Row:
    """Random ids named by their line alone, so that every system gets the same rows; the last ``supervised`` carry a loss."""
    draw = torch.Generator().manual_seed(line)
    ids = torch.randint(0, vocabulary, (length,), generator=draw).tolist()
    return make_row(ids, [i >= length - supervised for i in range(length)], line, "text")


def full_rows(tokens: int, vocabulary: int) -> list[Row]:
    """Rows that fill ``tokens``: each of 2,048, all but their first token supervised (a single shorter one below 2,048)."""
    length = min(FULL_ROW, tokens)
    return [_row(length, length - 1, vocabulary, line) for line in range(1, tokens // length + 1)]


def short_rows(lengths: str, tokens: int, vocabulary: int, alignment: int) -> list[Row]:
    """As many rows of a named length distribution as fit ``tokens`` once each is padded to ``alignment``, in their order."""
    rows, used = [], 0
    for line, (length, supervised) in enumerate(itertools.cycle(LENGTHS[lengths]), 1):
        used += padded_length(length, alignment)
        if used > tokens:
            return rows
        rows.append(_row(length, supervised, vocabulary, line))
    raise AssertionError("unreachable: the lengths repeat for ever")


def supervised_tokens(rows: Sequence[Row]) -> int:
    """Tokens that carry a loss."""
    return sum(row.supervised for row in rows)


def batch_of(rows: Sequence[Row], device: torch.device | str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` [rows, length] for transformers, from rows of one length (no mask: the causal path)."""
    return {
        "input_ids": torch.stack([torch.tensor(row.input_ids, dtype=torch.int64) for row in rows]).to(device),
        "labels": torch.stack([torch.tensor(row.labels, dtype=torch.int64) for row in rows]).to(device),
    }


def padding_free(rows: Sequence[Row], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Rows end to end as one, [1, tokens], told apart by ``position_ids`` that begin again: transformers' padding-free packing."""
    labels = []
    for row in rows:
        own = torch.tensor(row.labels, dtype=torch.int64)
        own[0] = IGNORED  # the token before it belongs to another row
        labels.append(own)
    return {
        "input_ids": torch.cat([torch.tensor(row.input_ids, dtype=torch.int64) for row in rows])[None].to(device),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None].to(device),
        "labels": torch.cat(labels)[None].to(device),
    }
