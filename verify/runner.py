"""Run claims on subjects within a budget, and say what the whole came to."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from verify import context, parallel
from verify.budget import Timed, unfinished
from verify.claims import CLAIMS
from verify.claims.outcome import FAIL, Outcome
from verify.histogram import Histogram, watching
from verify.mutants.table import SURVIVED, UNSEEN, Kill
from verify.sharpness import Sharpness
from verify.shuffle import shuffled_programs
from verify.subject import BadSubject, Subject

# Its cases take milliseconds.
SHORTEST = "accuracy"

# How a budget of seconds is shared out: per case, splits train models and cost the most.
SHARES = {
    "accuracy": 0.25, "splits": 0.25, "updates": 0.1, "repeat": 0.1, "invariance": 0.1, "gradients": 0.07,
    "guards": 0.07, "parity": 0.06,
}  # fmt: skip


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
    # As with `python -m pytest`, modules in the current folder are found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadSubject(f"--subject: {name!r}: {error}") from error
    subject = found() if callable(found) and not isinstance(found, Subject) else found
    if not isinstance(subject, Subject):
        kind = type(subject).__name__
        raise BadSubject(f"--subject: {name!r} is {kind}; allowed is a verify.subject.Subject")
    return subject


def subjects_of(name: str | None, device: str) -> list[Subject]:
    """The subject named ``module:object``, or the built-in ones for ``device``.

    Raises:
        BadSubject: as :func:`load_subject`.
    """
    if name:
        return [load_subject(name)]
    # Imported here alone: a subject of one's own needs no fastlora.
    from verify.subjects import built_in

    return built_in(device)


@dataclass
class Found:
    """All that a run found; filled as it goes, so that an interrupted one has what was tried.

    ``histograms``: by (claim, subject), where every judged element's error lay in its bound.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    histograms: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    sharpness: list[Sharpness] = field(default_factory=list)
    interrupted: bool = False

    def add(self, outcome: Outcome, histogram: Histogram) -> None:
        """Keep one outcome; they stay in the order of the claims."""
        self.outcomes.append(outcome)
        names = list(CLAIMS)
        self.outcomes.sort(key=lambda o: names.index(o.claim) if o.claim in names else len(names))
        self.histograms[outcome.claim, outcome.subject] = histogram


def run_claims(
    subjects: list[Subject],
    names: Iterable[str],
    *,
    seconds: float | None,
    cases: int | None,
    seed: int,
    after_each: Callable[[Found], None],
    found: Found | None = None,
) -> list[Outcome]:
    """Every claim on every subject; time that one leaves over goes to the next.

    The claim of the shortest cases comes last, so that a run ends when its budget does.
    """
    found = Found() if found is None else found
    todo = [(name, subject) for name in names for subject in subjects]
    todo.sort(key=lambda pair: (pair[0] == SHORTEST, pair[0] == SHORTEST and pair[1] is subjects[0]))
    begun, total = time.monotonic(), sum(_share(name) for name, _ in todo)
    for done, (name, subject) in enumerate(todo, start=1):
        share = None
        if seconds is not None:
            left = max(0.0, seconds - (time.monotonic() - begun))
            share = left * _share(name) / total
            total -= _share(name)
        histogram = Histogram()
        try:
            with watching(histogram), shuffled_programs(seed):
                outcome = CLAIMS[name].run(subject, Timed(seconds=share, cases=cases), seed)
        except KeyboardInterrupt as error:
            partial = unfinished(error, name)
            if partial is not None:
                found.add(partial, histogram)
            raise
        found.add(outcome, histogram)
        after_each(found)
        error = context.broken()
        if error:
            why = f"the GPU is unusable since {name} on {subject.name}: {error}"
            for later, other in todo[done:]:
                found.add(Outcome(later, CLAIMS[later].STATEMENT, other.name, reason=why), Histogram())
            after_each(found)
            break
    return found.outcomes


def _share(name: str) -> float:
    return SHARES.get(name, 0.05)


def nothing_to_run(names: Iterable[str], reason: str) -> list[Outcome]:
    """Rows that say why no claim was tried."""
    return [Outcome(name, CLAIMS[name].STATEMENT, "-", reason=reason) for name in names]


def run_mutants(
    subjects: list[Subject],
    seed: int,
    after_each: Callable[[Found], None],
    found: Found | None = None,
    *,
    again: Callable[[], list[Subject]] | None = None,
    jobs: int = 1,
) -> list[Kill]:
    """Every planted fault on every subject, then how sharp the claims are on it; see :func:`verify.parallel.tried`."""
    found = Found() if found is None else found
    for each in parallel.tried(parallel.all_tasks(subjects, seed), subjects, again, jobs):
        if isinstance(each, Kill):
            found.kills.append(each)
        else:
            found.sharpness += each
        after_each(found)
    return found.kills


def missing(required: Iterable[str], outcomes: list[Outcome]) -> list[str]:
    """Required words that no tried case covered: a device, a dtype, a backend or a claim."""
    covered = {tag for o in outcomes if o.cases for tag in (*o.tags, o.claim)}
    return [word for word in required if word not in covered]


def failed(outcomes: list[Outcome], kills: list[Kill]) -> bool:
    """A claim that fails, a fault that survives, or faults of which none could be tried."""
    if any(o.verdict == FAIL for o in outcomes) or any(k.verdict == SURVIVED for k in kills):
        return True
    return bool(kills) and all(k.verdict == UNSEEN for k in kills)
