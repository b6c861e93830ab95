"""``fastlora data``: rows as the model will see them, with the supervised tokens coloured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from fastlora.data import IGNORED, Row, RowSet, read_rows
from fastlora.errors import InputError
from fastlora.shapes import NAMES

SUPERVISED, CONTEXT = "bold green", "dim"


def render(row: Row, tokenizer) -> Text:
    """The decoded row; supervised tokens are green, the others dim.

    Runs of equal supervision are decoded together: one token alone may be half a character.
    """
    text = Text()
    start = 0
    for index in range(1, len(row) + 1):
        on = row.labels[start] != IGNORED
        if index < len(row) and (row.labels[index] != IGNORED) == on:
            continue
        piece = tokenizer.decode(
            row.input_ids[start:index].tolist(), clean_up_tokenization_spaces=False
        )
        text.append(piece, style=SUPERVISED if on else CONTEXT)
        start = index
    return text


def show_rows(
    path: str | os.PathLike,
    tokenizer,
    *,
    max_length: int | None = None,
    lines: Sequence[int] | None = None,
    count: int = 1,
    console: Console | None = None,
) -> RowSet:
    """Print rows of data files with their supervised tokens coloured, and what is wrong with the
    file.

    Nothing is refused for a bad row: looking is what the command is for. Where the console has no
        colour, a line
    below each row says which tokens are supervised.

    Args:
        path: a file, a folder or a glob of them. tokenizer: the model's.
        max_length: rows over it are named and not shown.
        lines: line numbers to show, counted from 1; None shows the first ``count`` usable rows.
        count: see ``lines``; at least 1.
        console: where to print; None is standard output.

    Returns:
        What was read.

    Raises:
        InputError: the file cannot be read or has no usable row, ``count`` below 1, or a line that
            is no usable row.
    """
    if count < 1:
        raise InputError(f"count is {count}; it must be at least 1")
    console = console or Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as place:
        found = read_rows(path, tokenizer, max_length=max_length, on_bad_row="skip", on_long_row="skip", cache=place)
        chosen = _choose(found, lines, count)
    console.print(f"rows are taken as: {NAMES[found.shape]}", markup=False)
    for row in chosen:
        console.rule(
            f"line {row.line}: {len(row)} tokens, {row.supervised} supervised", align="left"
        )
        console.print(render(row, tokenizer))
        if console.color_system is None:
            console.print(f"supervised tokens (counted from 0): {_ranges(row)}", markup=False)
    console.rule()
    console.print(found.summary(), markup=False)
    if found.counts["without_end"]:
        console.print(
            f"{found.counts['without_end']} rows do not end in an end token", markup=False
        )
    for note in found.notes:
        console.print(note, markup=False)
    for problem in found.problems:
        console.print(f"line {problem.line}: {problem.message}", markup=False)
    return found


def _choose(found: RowSet, lines: Sequence[int] | None, count: int) -> list[Row]:
    if lines is None:
        return found.rows[:count]
    problems = {problem.line: problem.message for problem in found.problems}
    chosen: list[Row] = []
    for line in lines:
        places = np.flatnonzero(found.rows.index["number"] == line)  # one in each file that has such a line
        if not len(places):
            why = problems.get(
                line, f"it is blank, or past the file's {found.counts['lines']} lines"
            )
            raise InputError(f"line is {line}, which is no usable row: {why}")
        chosen += [found.rows[int(place)] for place in places]
    return chosen


def _ranges(row: Row) -> str:
    """``3-7, 12-20``: places of supervised tokens."""
    on = [index for index in range(len(row)) if row.labels[index] != IGNORED]
    starts = [index for index in on if index == 0 or row.labels[index - 1] == IGNORED]
    stops = [index for index in on if index + 1 == len(row) or row.labels[index + 1] == IGNORED]
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, stops))
