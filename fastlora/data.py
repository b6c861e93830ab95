"""Training rows from a JSONL file: read, checked and tokenized; every refusal names its line.

A row holds ``messages`` (a chat), ``prompt`` and ``completion``, or ``text``; one file holds one of
the three. Blank lines are passed over, a UTF-8 byte order mark is taken off, other keys are
ignored but ``weight`` (weights.py).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fastlora import encode, template, weights
from fastlora.encode import RowError
from fastlora.errors import InputError

IGNORED = -100

# What a row can suffer from, and how a summary calls it.
KINDS = {
    "not_json": "not JSON",
    "bad_utf8": "not UTF-8",
    "bad_format": "wrong fields",
    "empty_completion": "empty completion",
    "no_supervised_token": "no supervised token",
    "template": "refused by the chat template",
    "too_long": "too long",
}
ON_BAD_ROW = ("refuse", "skip")
ON_LONG_ROW = ("refuse", "skip", "truncate")


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenized row.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n], not shifted: a supervised token's label is the token itself, others are
            -100. The first token has no predecessor to be predicted from and is never supervised.
        line: the line of the file it came from, counted from 1.
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


@dataclass(frozen=True)
class Problem:
    """A row that was not used: its line, the kind (a key of ``KINDS``) and a sentence."""

    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class RowSet:
    """The usable rows of a file.

    Attributes:
        rows: in the order of the file.
        counts: lines, blank, used, skipped, truncated, tokens, supervised, without_end (rows in
            which no end token is supervised, so that they do not teach the model to stop), and one
            count for each kind of ``KINDS``.
        problems: what was wrong, by line.
        format: one of ``encode.FORMATS``.
    """

    rows: list[Row]
    counts: dict[str, int]
    problems: list[Problem] = field(default_factory=list)
    format: str = "text"

    def summary(self) -> str:
        """One line for the start of a run."""
        counts = self.counts
        parts = [
            f"{counts['used']} rows ({self.format})",
            f"{counts['tokens']} tokens, {counts['supervised']} supervised",
        ]
        if counts["truncated"]:
            parts.append(f"{counts['truncated']} cut to the length limit")
        if counts["skipped"]:
            kinds = ", ".join(
                f"{counts[kind]} {name}" for kind, name in KINDS.items() if counts[kind]
            )
            lines = ", ".join(str(problem.line) for problem in self.problems[:5])
            more = ", ..." if len(self.problems) > 5 else ""
            parts.append(f"{counts['skipped']} skipped ({kinds}; lines {lines}{more})")
        return "; ".join(parts)


def make_row(ids: list[int], supervised: list[bool], line: int, kind: str, weight: float = 1.0) -> Row:
    """A :class:`Row` of ``ids`` and the mask of supervised tokens.

    Raises:
        RowError: no token after the first is supervised.
    """
    input_ids = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(supervised, dtype=bool), input_ids, np.int32(IGNORED)).astype(
        np.int32
    )
    labels[:1] = IGNORED
    if not (labels != IGNORED).any():
        raise RowError("no_supervised_token", "no supervised token")
    # Fixed byte order and width: the key names the row on every machine.
    content = input_ids.astype("<i4").tobytes() + labels.astype("<i4").tobytes()
    content += weights.name_of(weight)
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
    return Row(input_ids, labels, line, kind, key, weight)


def format_of(record: object) -> str:
    """Which of ``encode.FORMATS`` a parsed line has.

    Raises:
        RowError: it is no object, has the fields of none of the three, or of more than one.
    """
    if not isinstance(record, dict):
        raise RowError("bad_format", f"a {type(record).__name__}, not an object")
    found = []
    if "messages" in record:
        found.append("messages")
    if "prompt" in record or "completion" in record:
        found.append("prompt-completion")
        for name in ("prompt", "completion"):
            if name not in record:
                raise RowError(
                    "bad_format", f"no '{name}' beside the other of prompt and completion"
                )
    if "text" in record:
        found.append("text")
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(record)[:8]) or "none"
    what = "fields of more than one format" if found else "no known field"
    allowed = "give 'messages', 'prompt' and 'completion', or 'text'"
    raise RowError("bad_format", f"{what} (its keys: {keys}); {allowed}")


def encode_record(record: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and the mask of supervised tokens of one parsed line, by its :func:`format_of`."""
    kind = format_of(record)
    if kind == "messages":
        return template.encode_messages(tokenizer, record["messages"], tools=record.get("tools"))
    if kind == "prompt-completion":
        return encode.encode_pair(tokenizer, record["prompt"], record["completion"])
    return encode.encode_text(tokenizer, record["text"])


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without line end) of every line, without a byte order mark.

    Raises:
        InputError: the file cannot be read, or is UTF-16 or UTF-32.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if line.startswith(
                        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
                    ):
                        raise InputError(
                            f"data {os.fspath(path)} is UTF-16 or UTF-32; save it as UTF-8"
                        )
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.rstrip(b"\r\n")
    except OSError as error:
        raise InputError(
            f"data {os.fspath(path)} cannot be read: {error.strerror}; give a JSONL file"
        ) from error


def parse_line(line: bytes) -> object:
    """The JSON value of one line.

    Raises:
        RowError: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("bad_utf8", f"not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise RowError("not_json", f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        # Nested thousands deep, or an integer of thousands of digits.
        raise RowError("not_json", f"not JSON that Python can hold: {error}") from error


def read_rows(
    path: str | os.PathLike,
    tokenizer,
    *,
    max_length: int | None = None,
    on_bad_row: str = "refuse",
    on_long_row: str = "refuse",
) -> RowSet:
    """Read, check and tokenize a JSONL file.

    Args:
        path: the file.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens a row may have, end tokens counted; None sets no limit.
        on_bad_row: "refuse" (all bad rows are named in one error) or "skip" (counted and named in
            the result).
        on_long_row: "refuse", "skip", or "truncate" (the first ``max_length`` tokens are kept; the
            end token is lost).

    Returns:
        A :class:`RowSet` with at least one row.

    Raises:
        InputError: an argument out of range, an unreadable file, refused rows, or no usable row.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise InputError(f"on_bad_row is {on_bad_row!r}; it must be one of {', '.join(ON_BAD_ROW)}")
    if on_long_row not in ON_LONG_ROW:
        raise InputError(
            f"on_long_row is {on_long_row!r}; it must be one of {', '.join(ON_LONG_ROW)}"
        )
    if max_length is not None and max_length < 2:
        raise InputError(
            f"max_length is {max_length}; it must be at least 2 (one token to predict another from)"
        )

    reader = _Reader(tokenizer, max_length, on_long_row)
    for number, line in read_lines(path):
        reader.add(number, line)
    name = os.fspath(path)
    policy = {kind: on_long_row if kind == "too_long" else on_bad_row for kind in KINDS}
    refused = [problem for problem in reader.problems if policy[problem.kind] == "refuse"]
    if refused:
        raise InputError(_refusal(name, refused))
    if not reader.rows:
        first = reader.problems[:1]
        why = f"line {first[0].line}: {first[0].message}" if first else "it is empty"
        raise InputError(f"data {name} has no usable row; {why}")
    return reader.result()


class _Reader:
    """What has been read so far."""

    def __init__(self, tokenizer, max_length: int | None, on_long_row: str):
        self.tokenizer, self.max_length, self.on_long_row = tokenizer, max_length, on_long_row
        self.rows: list[Row] = []
        self.problems: list[Problem] = []
        self.format: str | None = None
        self.ends: frozenset[int] | None = None
        self.counts = {"lines": 0, "blank": 0, "truncated": 0, "without_end": 0}

    def add(self, number: int, line: bytes) -> None:
        self.counts["lines"] += 1
        if not line.strip():
            self.counts["blank"] += 1
            return
        try:
            self.rows.append(self._row(number, parse_line(line)))
        except RowError as error:
            self.problems.append(Problem(number, error.kind, str(error)))

    def _row(self, number: int, record: object) -> Row:
        kind = format_of(record)
        if self.format is None:
            self.format = kind
        elif kind != self.format:
            raise RowError(
                "bad_format",
                f"format {kind} in a file whose first row is {self.format}; use one format a file",
            )
        ids, supervised = encode_record(record, self.tokenizer)
        # Truncation takes end tokens away on purpose, so rows are looked at before it.
        if self.ends is None:
            self.ends = template.stop_ids(self.tokenizer, kind)
        without_end = not any(token in self.ends and on for token, on in zip(ids, supervised))
        cut = self.max_length is not None and len(ids) > self.max_length
        if cut:
            if self.on_long_row != "truncate":
                raise RowError("too_long", f"{len(ids)} tokens, the limit is {self.max_length}")
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
        row = make_row(ids, supervised, number, kind, weights.weight_of(record))
        self.counts["truncated"] += cut
        self.counts["without_end"] += without_end
        return row

    def result(self) -> RowSet:
        counts = dict(self.counts)
        counts["used"] = len(self.rows)
        counts["skipped"] = len(self.problems)
        counts["tokens"] = sum(len(row) for row in self.rows)
        counts["supervised"] = sum(row.supervised for row in self.rows)
        for kind in KINDS:
            counts[kind] = sum(problem.kind == kind for problem in self.problems)
        return RowSet(self.rows, counts, self.problems, self.format or "text")


def _refusal(name: str, problems: list[Problem], shown: int = 5) -> str:
    """One line that names the first refused rows and the flag that would skip them."""
    named = "; ".join(f"line {problem.line}: {problem.message}" for problem in problems[:shown])
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    remedies = []
    if any(problem.kind != "too_long" for problem in problems):
        remedies.append("--on-bad-row skip")
    if any(problem.kind == "too_long" for problem in problems):
        remedies.append("--on-long-row skip or truncate")
    rows = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    remedy = " and ".join(remedies)
    return f"data {name}: {rows} cannot be used: {named}{more}. Mend the file or give {remedy}"
