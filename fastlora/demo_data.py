"""The demo's data: docstrings of the user's own Python standard library, as prompt and completion.

Rules, all of them free of chance and of the order of folders:

- A row is a function (or method) with a docstring of over 20 characters and at least one other
  statement. The prompt is its source without the docstring and then ``CUE``; the completion is the
  docstring's first paragraph, on one line.
- Tests are left out. Of rows with equal prompts or equal completions the first one stays, by the
  name of module and function.
- A tenth of the top-level modules (with all that lies below) is held out: those whose name has an
  MD5 divisible by ten.
- Short functions first: those of at most ``SHORT`` tokens, in an order drawn by the seed, so that
  lengths are uneven; then longer ones by length, up to ``LONGEST`` tokens.

The set changes with the version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError
from fastlora.files import atomic_write_text

CUE = "\nDocstring:"
SHORTEST_DOCSTRING = 21  # characters
SHORT, LONGEST = 160, 512  # tokens of prompt and completion
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """One function: its module, its name with the classes around it, and the row made of it."""

    module: str
    name: str
    prompt: str
    completion: str

    @property
    def held_out(self) -> bool:
        """Whether the rule of the module holds it out."""
        return is_held_out(self.module)


@dataclass(frozen=True)
class DemoData:
    """What :func:`write` wrote.

    Attributes:
        train, held_out: the JSONL files.
        train_rows, held_out_rows: rows in them; fewer than asked for if the library has no more.
        modules_held_out: names of the top-level modules whose functions are in ``held_out`` alone.
        dropped: why functions were left out, with counts: "no body", "duplicate", "too long"; and
            "unreadable files".
    """

    train: Path
    held_out: Path
    train_rows: int
    held_out_rows: int
    modules_held_out: tuple[str, ...]
    dropped: dict[str, int]


def write(
    folder: Path,
    *,
    train_rows: int,
    held_out_rows: int,
    seed: int = 0,
    count_tokens: Callable[[str], int],
    library: Path | None = None,
) -> DemoData:
    """Write the two JSONL files into ``folder``; equal arguments give equal bytes.

    Args:
        folder: made if it is missing.
        train_rows, held_out_rows: how many rows to write, each at least 1.
        seed: of the order among short functions.
        count_tokens: number of tokens of a text.
        library: a folder of Python sources; this Python's standard library unless given.

    Raises:
        InputError: a number of rows below 1, or no row to write.
    """
    for name, value in (("train_rows", train_rows), ("held_out_rows", held_out_rows)):
        if value < 1:
            raise InputError(f"{name} = {value}: allowed is 1 or more")
    library = Path(sysconfig.get_path("stdlib")) if library is None else Path(library)
    dropped = {"no body": 0, "duplicate": 0, "too long": 0, "unreadable files": 0}
    examples = _distinct(read_examples(library, dropped), dropped)
    length = {example: count_tokens(example.prompt + example.completion) for example in examples}
    usable = [example for example in examples if length[example] <= LONGEST]
    dropped["too long"] = len(examples) - len(usable)

    def order(example: Example) -> tuple[int, str]:
        drawn = _md5(f"{seed}\n{example.module}\n{example.name}\n{example.completion}")
        return (0 if length[example] <= SHORT else length[example], drawn)

    usable.sort(key=order)
    train = [example for example in usable if not example.held_out][:train_rows]
    held_out = [example for example in usable if example.held_out][:held_out_rows]
    if not train or not held_out:
        raise InputError(
            f"demo data: {library} has {len(train)} functions with a docstring to train on and {len(held_out)} held"
            " out, and one of each is needed; is the standard library there as .py files?"
        )
    folder = Path(folder)
    paths = folder / TRAIN_FILE, folder / HELD_OUT_FILE
    for path, chosen in zip(paths, (train, held_out)):
        atomic_write_text(path, "".join(_line(example) for example in chosen))
    modules = {top_level(example.module) for example in usable if example.held_out}
    return DemoData(*paths, len(train), len(held_out), tuple(sorted(modules)), dropped)


def is_held_out(module: str) -> bool:
    """Whether a module's functions are held out: by the MD5 of its top-level name, one in ten."""
    return int(_md5(top_level(module)), 16) % 10 == 0


def top_level(module: str) -> str:
    """``email`` of ``email.mime.text``."""
    return module.partition(".")[0]


def read_examples(library: Path, dropped: dict[str, int] | None = None) -> Iterator[Example]:
    """Every function with a docstring below ``library``, by module name and place in the file.

    Counts what it leaves out in ``dropped``, under "no body" and "unreadable files".
    """
    dropped = {} if dropped is None else dropped
    for module, path in sorted(_modules(library)):
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():
                # Old escapes in a source of the library are not this program's business.
                warnings.simplefilter("ignore")
                tree = ast.parse(data)
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            # As Python counts lines: a form feed ends none.
            lines = io.StringIO(data.decode(encoding), newline=None).read().split("\n")
        except (OSError, SyntaxError, ValueError, RecursionError):
            dropped["unreadable files"] = dropped.get("unreadable files", 0) + 1
            continue
        for name, node in _functions(tree):
            docstring = ast.get_docstring(node)
            if docstring is None or len(docstring) < SHORTEST_DOCSTRING:
                continue
            prompt, completion = _prompt(node, lines), _first_paragraph(docstring)
            if prompt is None or not completion or not _utf8(prompt + completion):
                dropped["no body"] = dropped.get("no body", 0) + 1
                continue
            yield Example(module, name, prompt, completion)


def _modules(library: Path) -> Iterator[tuple[str, Path]]:
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts), path


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions with dotted names, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            inner = f"{prefix}{child.name}."
            if isinstance(child, _FUNCTIONS):
                yield inner[:-1], child
        yield from _functions(child, inner)


def _prompt(node: ast.AST, lines: list[str]) -> str | None:
    """Source without the docstring, then the cue; None if nothing but the docstring makes the body."""
    docstring, *rest = node.body
    if not rest or rest[0].lineno <= docstring.end_lineno or docstring.lineno == node.lineno:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip("\n") + "\n" + CUE


def _first_paragraph(docstring: str) -> str:
    """The first paragraph on one line, after one space: prompt and completion are joined as they stand."""
    text = " ".join(inspect.cleandoc(docstring).strip().split("\n\n")[0].split())
    return f" {text}" if len(text) >= SHORTEST_DOCSTRING else ""


def _utf8(text: str) -> bool:
    """Whether UTF-8 can hold the text: a docstring may spell half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _distinct(examples: Iterator[Example], dropped: dict[str, int]) -> list[Example]:
    seen: set[str] = set()
    kept = []
    for example in examples:
        if example.prompt in seen or example.completion in seen:
            dropped["duplicate"] += 1
            continue
        seen |= {example.prompt, example.completion}
        kept.append(example)
    return kept


def _line(example: Example) -> str:
    record = {"prompt": example.prompt, "completion": example.completion,
              "function": f"{example.module}.{example.name}"}  # fmt: skip
    return json.dumps(record) + "\n"


def _md5(text: str) -> str:
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()
