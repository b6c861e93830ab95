"""Run claims on subjects within a budget, and say what the whole came to."""

from __future__ import annotations

import importlib
import pathlib
import re
import time
from collections.abc import Callable, Iterable

from verify.claims import CLAIMS
from verify.claims.outcome import FAIL, Budget, Outcome
from verify.mutants import MUTANTS
from verify.mutants.table import SURVIVED, UNSEEN, Kill, try_mutant
from verify.subject import BadSubject, Subject

# How a budget of seconds is shared out: per case, splits train models and cost the most.
SHARES = {
    "accuracy": 0.25, "splits": 0.25, "updates": 0.1, "repeat": 0.1, "invariance": 0.1, "gradients": 0.07,
    "guards": 0.07, "parity": 0.06,
}  # fmt: skip
UNITS = {"s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """``60s``, ``2m`` or ``90`` in seconds.

    Raises:
        BadSubject: anything else, or not more than 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    if not found or float(found[1]) <= 0:
        raise BadSubject(f"--budget: {text!r}; allowed is a time above 0 such as 60s, 2m or 90")
    return float(found[1]) * UNITS[found[2]]


def check_output(path: str) -> None:
    """Refuse a report's path before any work.

    Raises:
        BadSubject: its folder does not exist, or it is a folder.
    """
    target = pathlib.Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise BadSubject(f"--output: {path!r}; allowed is a file in a folder that exists")


def load_subject(name: str) -> Subject:
    """The object named ``module:object``: a :class:`~verify.subject.Subject`, or a function that
    returns one.

    Raises:
        BadSubject: no such module or object, or it is no subject.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise BadSubject(f"--subject: {name!r}; allowed is module:object")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadSubject(f"--subject: {name!r}: {error}") from error
    subject = found() if callable(found) and not isinstance(found, Subject) else found
    if not isinstance(subject, Subject):
        kind = type(subject).__name__
        raise BadSubject(f"--subject: {name!r} is {kind}; allowed is a verify.subject.Subject")
    return subject


def run_claims(
    subjects: list[Subject],
    names: Iterable[str],
    *,
    seconds: float | None,
    cases: int | None,
    seed: int,
    after_each: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Every claim on every subject; time that one leaves over goes to the next."""
    todo = [(name, subject) for name in names for subject in subjects]
    outcomes: list[Outcome] = []
    begun, total = time.monotonic(), sum(SHARES[name] for name, _ in todo)
    for name, subject in todo:
        share = None
        if seconds is not None:
            left = max(0.0, seconds - (time.monotonic() - begun))
            share = left * SHARES[name] / total
            total -= SHARES[name]
        outcomes.append(CLAIMS[name].run(subject, Budget(seconds=share, cases=cases), seed))
        after_each(outcomes)
    return outcomes


def nothing_to_run(names: Iterable[str], reason: str) -> list[Outcome]:
    """Rows that say why no claim was tried."""
    return [Outcome(name, CLAIMS[name].STATEMENT, "-", reason=reason) for name in names]


def run_mutants(
    subjects: list[Subject], seed: int, after_each: Callable[[list[Kill]], None]
) -> list[Kill]:
    """Every planted fault on every subject."""
    kills: list[Kill] = []
    for subject in subjects:
        for mutant in MUTANTS:
            kills.append(try_mutant(mutant, subject, seed))
            after_each(kills)
    return kills


def missing(required: Iterable[str], outcomes: list[Outcome]) -> list[str]:
    """Required words that no tried case covered: a device, a dtype, a backend or a claim."""
    covered = {tag for o in outcomes if o.cases for tag in (*o.tags, o.claim)}
    return [word for word in required if word not in covered]


def failed(outcomes: list[Outcome], kills: list[Kill]) -> bool:
    """A claim that fails, a fault that survives, or faults of which none could be tried."""
    if any(o.verdict == FAIL for o in outcomes) or any(k.verdict == SURVIVED for k in kills):
        return True
    return bool(kills) and all(k.verdict == UNSEEN for k in kills)
