"""README and docs cut into what can be checked: Python blocks, shell commands, inline code, links."""

from __future__ import annotations

import pathlib
import re
import shlex
from dataclasses import dataclass

import source

PAGES = [source.ROOT / "README.md", source.ROOT / "CONTRIBUTING.md", *sorted((source.ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after the fence, its text, and the line of the page where the text begins."""

    words: tuple[str, ...]
    text: str
    line: int


def blocks(page: pathlib.Path, language: str) -> list[Block]:
    """Fenced blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(tuple(match[1].split()), match[2], text[: match.start(2)].count("\n") + 1) for match in _FENCE.finditer(text)
    ]
    return [block for block in found if block.words[:1] == (language,)]


def spans(page: pathlib.Path) -> list[str]:
    """Inline code, line breaks made spaces."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [" ".join(match[1].split()) for match in _INLINE.finditer(prose)]


def commands(page: pathlib.Path) -> list[list[str]]:
    """Words of every shell command: in ``sh`` blocks, indented blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    lines += [line[4:] for line in _FENCE.sub("", text).splitlines() if re.match(r" {4}\S", line)]
    starts = ("nox ", "fastlora ", "python -m ", "pip ")
    return [shlex.split(line) for line in [*lines, *spans(page)] if line.startswith(starts)]


def all_commands(*first: str) -> list[tuple[str, list[str]]]:
    """(page, words after ``first``) of every command on any page that begins with these words."""
    return [
        (page.name, words[len(first) :])
        for page in PAGES
        for words in commands(page)
        if tuple(words[: len(first)]) == first
    ]
