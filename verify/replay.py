"""One case again, from its text; and a failing one made smaller while it still fails.

A case prints as Python, such as ``LinearCase(m=17, k=33, ...)``. :func:`parse` reads that text without evaluating it,
:func:`replay` runs a claim on this case alone, and :func:`shrunk` looks for a simpler one that fails the same claim.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import pkgutil
import re
import time
from collections.abc import Iterator
from unittest import mock

import verify
from verify import strategies
from verify import subject as protocol
from verify.budget import Timed
from verify.claims import CLAIMS
from verify.claims.outcome import Outcome
from verify.mutants.base import PARTS
from verify.oracle.adamw import Hyper
from verify.subject import BadSubject, Subject

# Which part of a subject a case is for.
PART_OF = {
    "LinearCase": "linear", "SplitCase": "linear", "RowsCase": "operations", "OptimizerCase": "optimizer",
    "TrainCase": "trainer", "AdapterCase": "files",
}  # fmt: skip
# What a simpler case has in place of these.
PLAIN = {"values": "normal", "layout": "plain", "dtype": "fp32"}
MOST_TRIES = 60
LOOKS = 8


def _kinds() -> dict[str, type]:
    """Case classes by name, from ``verify.subject`` and every module of strategies."""
    names = [m.name for m in pkgutil.iter_modules(verify.__path__) if m.name.startswith("strategies")]
    modules = [protocol, *(importlib.import_module(f"verify.{name}") for name in names)]
    return {name: getattr(m, name) for name in PART_OF for m in modules if hasattr(m, name)}


def parse(text: str):
    """The case that ``text`` names.

    Raises:
        BadSubject: it is no case.
    """

    kinds = _kinds()
    names = {**kinds, "Hyper": Hyper}

    def build(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and not node.args:
            return names[node.func.id](**{k.arg: build(k.value) for k in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(build(item) for item in node.elts)
        return ast.literal_eval(node)

    try:
        case = build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise BadSubject(f"--case: {text!r}: {error}; allowed is a case as a failure prints it") from error
    if type(case).__name__ not in kinds:
        raise BadSubject(f"--case: {text!r}; allowed is one of {', '.join(kinds)}")
    return case


def in_sentence(sentence: str):
    """The last case in a failure's sentence, or None."""
    starts = [m.start() for m in re.finditer(rf"\b(?:{'|'.join(PART_OF)})\(", sentence)]
    for start in reversed(starts):
        depth = 0
        for end in range(start, len(sentence)):
            depth += {"(": 1, ")": -1}.get(sentence[end], 0)
            if depth == 0 and sentence[end] == ")":
                return parse(sentence[start : end + 1])
    return None


def replay(subject: Subject, claim: str, case, seed: int = 0) -> Outcome:
    """The claim on this case alone. Parts of the subject that are not for it are left out."""
    part = PART_OF[type(case).__name__]
    if getattr(subject, part, None) is None:
        raise BadSubject(f"--case: {type(case).__name__} needs the part {part!r}; {subject.name} has none")
    keep = {part, "optimizer"} if part == "trainer" else {part}
    others = set(PARTS) - keep
    alone = dataclasses.replace(subject, **{name: None for name in others if hasattr(subject, name)})
    if part == "operations":
        only = _Only(alone.operations, (alone.operations.operations[case.operation],))
        alone = dataclasses.replace(alone, operations=only)
        case = dataclasses.replace(case, operation=0)
    asked = itertools.count()

    def ordered(*arguments, **more):
        # A claim looks one case ahead; one that takes no case of this kind would look for ever.
        if next(asked) >= LOOKS:
            raise _NotTaken
        return (case,)

    try:
        with mock.patch.object(strategies, "ordered", ordered):
            return CLAIMS[claim].run(alone, Timed(cases=1), seed)
    except _NotTaken:
        return Outcome(claim, CLAIMS[claim].STATEMENT, subject.name, reason=f"the claim does not take {case!r}")


class _NotTaken(BaseException):
    """Not an Exception: claims report those as failures of the subject."""


class _Only:
    """A part with one operation."""

    def __init__(self, part, operations) -> None:
        self._part, self.operations = part, operations

    def __getattr__(self, name: str):
        return getattr(self._part, name)


def shrunk(subject: Subject, claim: str, case, seconds: float, seed: int = 0):
    """The simplest case found that fails too: fewer rows, rounder numbers, plainer values. ``case`` itself if it does not
    fail alone, or is the simplest."""
    begun, tries = time.monotonic(), 0
    if not replay(subject, claim, case, seed).failures:
        return case
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(case):
            if tries >= MOST_TRIES or time.monotonic() - begun > seconds:
                return case
            tries += 1
            if replay(subject, claim, candidate, seed).failures:
                case, smaller = candidate, True
                break
    return case


def _simpler(case) -> Iterator:
    """Cases that differ in one field, the simplest value first."""
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if field.name in ("operation", "threads", "steps"):
            continue
        for other in _plainer(field.name, value):
            if other != value:
                yield dataclasses.replace(case, **{field.name: other})


def _plainer(name: str, value) -> Iterator:
    if name in PLAIN:
        yield PLAIN[name]
    elif isinstance(value, bool):
        yield False
    elif isinstance(value, int):
        yield from (n for n in (1, 2, value // 2, value - 1) if 1 <= n < value)
        if name == "seed":
            yield 0
    elif isinstance(value, float):
        yield 0.0 if name == "dropout" else 1.0
    elif isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        if len(value) > 3:
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for i, item in enumerate(value):
            yield from (value[:i] + (n,) + value[i + 1 :] for n in (5, item // 2) if 5 <= n < item)


def command(subject: str | None, device: str, claim: str, case) -> str:
    """What to paste into a shell to see it again."""
    chosen = f"--subject {subject}" if subject else f"--device {device}"
    return f'python -m verify {chosen} --claim {claim} --case "{case!r}"'
