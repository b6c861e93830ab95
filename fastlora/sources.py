"""Data files as people have them: JSONL, a JSON array, Parquet; one, a folder, or a glob of them; cut into tasks.

A task is a piece of one file that can be read on its own, in another process too: a span of bytes of a JSONL file, some
records of a JSON array, a row group of a Parquet file. Nothing here holds more than one piece in memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Iterator

from fastlora.encode import RowError
from fastlora.errors import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
TASK_BYTES = 1 << 21
# A JSON array's record must end within so much text, so that a missing bracket does not read the whole file.
MOST_RECORD = 1 << 26
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class Line(int):
    """A row's place: the line on which it stands, counted from 1; in Parquet and in a JSON array its number.

    As text it also names the file where a data set has more than one, and the line on which a record of an array begins.
    """

    begin: int
    file: str

    def __new__(cls, number: int, begin: int = 0, file: str = "") -> Line:
        line = super().__new__(cls, number)
        line.begin, line.file = int(begin), file
        return line

    def __str__(self) -> str:
        text = f"{self.begin} (record {int(self)})" if self.begin else str(int(self))
        return f"{text} of {self.file}" if self.file else text

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self):
        return Line, (int(self), self.begin, self.file)


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of a file.

    Attributes:
        file: its place in the list of files. path: the file. kind: "jsonl", "json" or "parquet".
        start, stop: bytes of a JSONL file (the lines that begin in them); the row group and one past it of Parquet.
        first: number of the first record (Parquet, JSON array), counted from 1.
        records: (line it begins on, its text) of each record of a JSON array.
        size: bytes of the file that it stands for, for the progress bar.
    """

    file: int
    path: str
    kind: str
    start: int = 0
    stop: int = 0
    first: int = 1
    records: tuple[tuple[int, str], ...] = ()
    size: int = 0


def find_files(data: str | os.PathLike) -> tuple[list[pathlib.Path], int]:
    """(the data files that a path names: a file, a folder's files by name, or a glob's matches; files left out of a folder).

    Raises:
        InputError: nothing there, or nothing that can be read as data.
    """
    path = pathlib.Path(data)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        files = [p for p in inside if p.suffix.lower() in SUFFIXES]
        if not files:
            raise InputError(f"data {os.fspath(data)} cannot be read: the folder holds no {', '.join(SUFFIXES)} file")
        return files, len(inside) - len(files)
    if path.exists() or not glob.has_magic(os.fspath(data)):
        return [path], 0
    files = sorted(pathlib.Path(p) for p in glob.glob(os.fspath(data), recursive=True) if pathlib.Path(p).is_file())
    if not files:
        raise InputError(f"data {os.fspath(data)} cannot be read: no file matches")
    return files, 0


def kind_of(path: pathlib.Path) -> str:
    """"jsonl", "json" (one array) or "parquet", by the file's name and its first bytes.

    Raises:
        InputError: it cannot be read, is compressed, is UTF-16 or UTF-32, or is Parquet and pyarrow is not installed.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"data {path} cannot be read: {error.strerror}; give a JSONL, JSON or Parquet file, a folder or "
                         "a glob of them") from error
    for sign, name in _PACKED.items():
        if head.startswith(sign):
            raise InputError(f"data {path} is compressed ({name}); unpack it first")
    if head.startswith(_WIDE):
        raise InputError(f"data {path} is UTF-16 or UTF-32; save it as UTF-8")
    if path.suffix.lower() == ".parquet" or head.startswith(b"PAR1"):
        _pyarrow(path)
        return "parquet"
    if path.suffix.lower() == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return "json"
    return "jsonl"


def _pyarrow(path: str | os.PathLike):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"data {os.fspath(path)}: Parquet needs the package pyarrow; pip install 'fastlora[parquet]'") from error
    return pyarrow.parquet


def tasks(files: list[pathlib.Path], size: int = TASK_BYTES) -> Iterator[Task]:
    """The pieces of all files, in order.

    Raises:
        InputError: a file that cannot be read at all; a JSON array that breaks off, with its line.
    """
    for index, path in enumerate(files):
        kind = kind_of(path)
        if kind == "jsonl":
            whole = path.stat().st_size
            for start in range(0, whole, size):
                stop = min(start + size, whole)
                yield Task(index, str(path), kind, start, stop, size=stop - start)
        elif kind == "json":
            yield from _array_tasks(index, path, size)
        else:
            first = 1
            meta = _open_parquet(path).metadata
            for group in range(meta.num_row_groups):
                part = meta.row_group(group)
                yield Task(index, str(path), kind, group, group + 1, first, size=part.total_byte_size)
                first += part.num_rows


def records(task: Task) -> Iterator[tuple[int, int, bytes | str | object]]:
    """(number, line on which a record of an array begins or 0, its raw JSON or the value itself) of every row of a task.

    A JSONL task counts its lines from 1, blank ones too; only who has read all before knows the place in the file.

    Raises:
        InputError: a Parquet file that cannot be decoded.
    """
    if task.kind == "json":
        for number, (begin, text) in enumerate(task.records, start=task.first):
            yield number, begin, text
    elif task.kind == "jsonl":
        with open(task.path, "rb") as file:
            if task.start:
                # The line that the span cuts into belongs to the task before.
                file.seek(task.start - 1)
                file.readline()
            number = 0
            while file.tell() < task.stop:
                line = file.readline()
                number += 1
                if task.start == 0 and number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, 0, line.rstrip(b"\r\n")
    else:
        number = task.first
        source = _open_parquet(task.path)
        try:
            for batch in source.iter_batches(batch_size=512, row_groups=[task.start]):
                for value in batch.to_pylist():
                    yield number, 0, value
                    number += 1
        except (OSError, ValueError) as error:
            raise InputError(f"data {task.path}: line {number}: the Parquet file is damaged ({error})") from error


def parse(raw: bytes | str | object) -> object:
    """The value of a row.

    Raises:
        RowError: it is not UTF-8, or not JSON.
    """
    if not isinstance(raw, bytes | str):
        return raw
    try:
        return json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as error:
        raise RowError("bad_utf8", f"not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise RowError("not_json", f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        # Nested thousands deep, or an integer of thousands of digits.
        raise RowError("not_json", f"not JSON that Python can hold: {error}") from error


def _open_parquet(path: str | os.PathLike):
    parquet = _pyarrow(path)
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data {os.fspath(path)}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error


class _ArrayText:
    """The text of a JSON array, a window at a time."""

    def __init__(self, file, path: pathlib.Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.counted = 0  # characters of the window whose line ends are in self.line

    def more(self, size: int = 1 << 16) -> None:
        """Drop what is done and read on."""
        self.here()
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        block = self.file.read(max(size, len(self.text)))
        self.ended = not block
        try:
            self.text += self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + block[: error.start].count(b"\n")
            raise InputError(f"data {self.path}: line {line}: not UTF-8; a JSON array cannot be read past it") from error

    def here(self) -> int:
        """The line of the place reached."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def sign(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def fail(self, what: str) -> InputError:
        return InputError(f"data {self.path}: line {self.here()}: not JSON: {what}; a JSON array cannot be read past it")


def _array_tasks(index: int, path: pathlib.Path, size: int) -> Iterator[Task]:
    scan = json.JSONDecoder().raw_decode
    with open(path, "rb") as file:
        text = _ArrayText(file, path)
        text.more()
        text.text = text.text.removeprefix("\ufeff")
        text.sign()
        text.at += 1  # the bracket, see kind_of
        held: list[tuple[int, str]] = []
        first, weight = 1, 0
        closed = text.sign() == "]"
        while not closed:
            begin, record = _next_record(text, scan)
            held.append((begin, record))
            weight += len(record)
            sign = text.sign()
            text.at += 1
            closed = sign == "]"
            if not closed and sign != ",":
                raise text.fail(f"{sign!r} where a comma or ] should follow" if sign else "the array is cut off")
            if weight >= size or closed:
                yield Task(index, str(path), "json", first=first, records=tuple(held), size=weight)
                first, weight, held = first + len(held), 0, []


def _next_record(text: _ArrayText, scan) -> tuple[int, str]:
    """(line it begins on, text) of the record that begins at the next sign."""
    while True:
        if not text.sign():
            raise text.fail("the array is cut off")
        try:
            _, stop = scan(text.text, text.at)
        except RecursionError as error:
            raise text.fail("nested too deep") from error
        except json.JSONDecodeError as error:
            if text.ended or len(text.text) - text.at > MOST_RECORD:
                text.at = min(error.pos, len(text.text))
                raise text.fail(error.msg) from error
            text.more()
            continue
        if stop == len(text.text) and not text.ended:
            text.more()  # a number may go on
            continue
        begin, start = text.here(), text.at
        text.at = stop
        return begin, text.text[start:stop]
