"""Training rows from data files: read, checked and tokenized; every refusal names its file and line.

Which files: sources.py. Which fields: shapes.py. Small data stays in memory; large data goes through a cache on disk
(token_cache.py), and rows are read from it one by one.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastlora import sources, token_cache
from fastlora.encode import RowError
from fastlora.errors import InputError
from fastlora.shapes import NAMES, encode_record, format_of, shape_of
from fastlora.sources import Line
from fastlora.token_rows import IGNORED, Row, Store, TokenRows, make_row, mapped
from fastlora.token_workers import encode_all, processes
from fastlora.tokenizing import Encoding

__all__ = ["IGNORED", "KINDS", "Problem", "Row", "RowSet", "encode_record", "make_row", "read_rows"]

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
# Data of more bytes than this are tokenized by several processes into a cache on disk.
LARGE = 1 << 25
# So many problems are kept with their line; all are counted.
MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Problem:
    """A row that was not used: its line, the kind (a key of ``KINDS``) and a sentence."""

    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class RowSet:
    """The usable rows of a data set.

    Attributes:
        rows: in the order of the files; read one by one from arrays, which may be larger than memory.
        counts: lines, blank, used, skipped, truncated, ends_lost (of these, rows that lost their end token), tokens,
            supervised, without_end (rows in which no end token is supervised, so that they do not teach the model to stop),
            and one count for each kind of ``KINDS``.
        problems: what was wrong, by line; the first ``MOST_PROBLEMS``.
        format: one of ``encode.FORMATS``. shape: one of ``shapes.SHAPES``.
        files: how many. notes: sentences to print (files left out). tokens: a sentence that says where they are cached, or "".
    """

    rows: Sequence[Row]
    counts: dict[str, int]
    problems: list[Problem] = field(default_factory=list)
    format: str = "text"
    shape: str = "text"
    files: int = 1
    notes: tuple[str, ...] = ()
    tokens: str = ""

    def summary(self) -> str:
        """One line for the start of a run."""
        counts = self.counts
        shown = NAMES[self.shape]
        if self.shape == "instruction":
            shown += ", as a chat" if self.format == "messages" else ", by Alpaca's prompt"
        parts = [
            f"{counts['used']} rows ({shown})" + (f" of {self.files} files" if self.files > 1 else ""),
            f"{counts['tokens']} tokens, {counts['supervised']} supervised",
        ]
        if counts["truncated"]:
            lost = f" ({counts['ends_lost']} without their end token now)" if counts["ends_lost"] else ""
            parts.append(f"{counts['truncated']} cut to the length limit{lost}")
        if counts["skipped"]:
            kinds = ", ".join(
                f"{counts[kind]} {name}" for kind, name in KINDS.items() if counts[kind]
            )
            lines = ", ".join(str(problem.line) for problem in self.problems[:5])
            more = ", ..." if counts["skipped"] > 5 else ""
            parts.append(f"{counts['skipped']} skipped ({kinds}; lines {lines}{more})")
        return "; ".join(parts)


def read_rows(
    path: str | os.PathLike,
    tokenizer,
    *,
    max_length: int | None = None,
    on_bad_row: str = "refuse",
    on_long_row: str = "refuse",
    cache: str | os.PathLike | None = None,
    always_cache: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowSet:
    """Read, check and tokenize data files.

    Args:
        path: a JSONL, JSON or Parquet file, a folder, or a glob of them.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens a row may have, end tokens counted; None sets no limit.
        on_bad_row: "refuse" (bad rows are named in one error) or "skip" (counted and named in
            the result).
        on_long_row: "refuse", "skip", or "truncate": the first ``max_length`` tokens are kept, as other trainers do; no
            end token is put behind them, for it would teach the model to stop in mid-sentence. They are counted.
        cache: folder for the tokens of data over ``LARGE`` bytes, or None to hold them in memory.
        always_cache: use ``cache`` for small data too. workers: processes for large data; None: a core each.
        progress: called with (bytes done, bytes in all) of large data.

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
    files, left_out = sources.find_files(path)
    for file in files:
        sources.kind_of(file)
    size = sum(file.stat().st_size for file in files)
    large = size > LARGE
    gather = _Gather(os.fspath(path), files, on_bad_row, on_long_row, stop_early=large)
    if left_out:
        gather.notes.append(f"{left_out} other files in {os.fspath(path)} are no data and were not read")
    if cache is None or not (large or always_cache):
        store = Store()
        _encode(gather, store, tokenizer, max_length, large, workers, size, progress)
        return gather.result(TokenRows(*store.arrays(), gather.format, gather.names))

    options = {"max_length": max_length, "on_bad_row": on_bad_row, "on_long_row": on_long_row}
    name = token_cache.digest(files, tokenizer, options)
    folder = pathlib.Path(cache) / name
    state = token_cache.stored(folder)
    if state is None:
        with token_cache.writing(cache, name) as (temporary, state):
            store = Store(temporary)
            try:
                _encode(gather, store, tokenizer, max_length, large, workers, size, progress)
            finally:
                store.close()
            state |= gather.state()
        gather.tokens = f"tokens: written to {folder}, to be used again by runs on the same data"
    else:
        gather.restore(state)
        gather.tokens = f"tokens: read from {folder}, made by an earlier run on the same data"
    try:
        arrays = mapped(folder)
    except (OSError, ValueError):
        arrays = ()
    if [len(array) for array in arrays] != [gather.counts["tokens"], gather.counts["tokens"], gather.rows]:
        raise InputError(f"token_cache = {os.fspath(cache)!r}: {folder} is damaged; remove that folder")
    return gather.result(TokenRows(*arrays, gather.format, gather.names))


def _encode(gather: _Gather, store: Store, tokenizer, max_length, large: bool, workers: int | None, size: int,
            progress: Callable[[int, int], None] | None) -> None:
    """All tasks into ``store`` and ``gather``."""
    before = [file.stat().st_mtime_ns for file in gather.files]
    gather.find_shape(tokenizer)
    encoding = Encoding(tokenizer, gather.shape, max_length, gather.on_long_row)
    wanted = (processes() if workers is None else workers) if large or workers else 0
    done, shown = 0, 0
    for task, piece in encode_all(sources.tasks(gather.files), encoding, wanted):
        gather.add(task, piece, store)
        done += task.size
        if progress and done - shown >= size // 500:
            shown = done
            progress(min(done, size), size)
    if before != [file.stat().st_mtime_ns for file in gather.files]:
        raise InputError(f"data {gather.name} was changed while it was read; start again once it is complete")
    gather.end()


class _Gather:
    """Counts and problems of a data set while its tasks come in, in order; knows each line's number."""

    def __init__(self, name: str, files: list[pathlib.Path], on_bad_row: str, on_long_row: str, stop_early: bool) -> None:
        self.name, self.files, self.on_bad_row, self.on_long_row = name, files, on_bad_row, on_long_row
        self.stop_early = stop_early
        # A row's line is named with its file where there are several.
        self.names = _short([str(file) for file in files]) if len(files) > 1 else ()
        self.shape, self.format, self.rows = "", "text", 0
        self.counts: Counter = Counter()
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.tokens = ""
        self._file, self._lines = -1, 0

    def find_shape(self, tokenizer) -> None:
        """The shape of the first row that has one decides for all."""
        for task in sources.tasks(self.files):
            for _, _, raw in sources.records(task):
                try:
                    self.shape = shape_of(sources.parse(raw))
                except RowError:
                    continue
                self.format = format_of(self.shape, tokenizer)
                return

    def add(self, task: sources.Task, piece, store: Store) -> None:
        if task.file != self._file:
            self._file, self._lines = task.file, 0
        # The lines of a piece of JSONL are counted from its start; others know their numbers.
        offset = self._lines if task.kind == "jsonl" else 0
        self._lines += piece.counts["lines"]
        piece.index["number"] += offset
        store.add(piece.ids, piece.mask, piece.index)
        self.rows += len(piece.index)
        self.counts.update(piece.counts)
        self.counts["tokens"] += len(piece.ids)
        for number, begin, kind, message in piece.problems:
            self.counts[kind] += 1
            self.counts["skipped"] += 1
            if len(self.problems) < MOST_PROBLEMS:
                line = Line(number + offset, begin, self.names[task.file] if self.names else "")
                self.problems.append(Problem(line, kind, message))
        if self.stop_early:
            self.refuse()

    def refuse(self) -> None:
        """Raise InputError if a row was found that may not be skipped."""
        long_may_go = self.on_long_row == "skip"
        refused = [p for p in self.problems
                   if (not long_may_go if p.kind == "too_long" else self.on_bad_row == "refuse")]
        if refused:
            raise InputError(_refusal(self.name, refused))

    def end(self) -> None:
        """Refuse what must be refused once all was read."""
        self.refuse()
        if not self.rows:
            first = self.problems[0] if self.problems else None
            why = f"line {first.line}: {first.message}" if first else "it is empty"
            raise InputError(f"data {self.name} has no usable row; {why}")

    def state(self) -> dict:
        """What is needed beside the arrays, for JSON."""
        problems = [(int(p.line), p.line.begin, p.line.file, p.kind, p.message) for p in self.problems]
        return {"shape": self.shape, "format": self.format, "rows": self.rows, "counts": dict(self.counts),
                "problems": problems}

    def restore(self, state: dict) -> None:
        """Take over the :meth:`state` of an earlier reading."""
        self.shape, self.format, self.rows = state["shape"], state["format"], state["rows"]
        self.counts = Counter(state["counts"])
        self.problems = [Problem(Line(n, begin, file), kind, message) for n, begin, file, kind, message in state["problems"]]

    def result(self, rows: TokenRows) -> RowSet:
        names = ("lines", "blank", "truncated", "ends_lost", "without_end", "supervised", "skipped", "tokens", *KINDS)
        counts = {name: int(self.counts[name]) for name in names} | {"used": self.rows}
        return RowSet(rows, counts, self.problems, self.format, self.shape or "text", len(self.files), tuple(self.notes),
                      self.tokens)


def _short(paths: list[str]) -> tuple[str, ...]:
    """Paths without the folder that all have in common."""
    common = os.path.commonpath([os.path.dirname(path) or "." for path in paths]) if all(
        os.path.dirname(path) for path in paths) else ""
    return tuple(os.path.relpath(path, common) if common else path for path in paths)


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
