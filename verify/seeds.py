"""Many seeds on sound subjects: no claim may fail on any. What a harness that cries wolf would not survive."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from verify.budget import Timed
from verify.claims import CLAIMS
from verify.claims.outcome import Outcome
from verify.histogram import Histogram, watching
from verify.runner import Found
from verify.shuffle import shuffled_programs
from verify.subject import Subject


def run(
    subjects: list[Subject],
    names: Iterable[str],
    seeds: Iterable[int],
    cases: int,
    found: Found,
    after_each: Callable[[], None],
) -> None:
    """Every claim on every subject with every seed, ``cases`` each; one row for all seeds of a claim and subject."""
    totals: dict[tuple[str, str], tuple[Outcome, Histogram]] = {}
    for count, seed in enumerate(seeds, 1):
        for subject in subjects:
            for name in names:
                key = name, subject.name
                if key not in totals:
                    totals[key] = Outcome(name, CLAIMS[name].STATEMENT, subject.name), Histogram()
                    found.add(*totals[key])
                total, histogram = totals[key]
                with watching(histogram), shuffled_programs(seed):
                    _add(total, CLAIMS[name].run(subject, Timed(cases=cases), seed), seed)
                total.notes[:] = [f"seeds tried: {count}, the last is {seed}; {cases} cases each"]
        after_each()


def _add(total: Outcome, one: Outcome, seed: int) -> None:
    total.cases += one.cases
    total.seconds += one.seconds
    total.tags |= one.tags
    total.reason = one.reason
    for failure in one.failures:
        total.fail(f"seed {seed}: {failure}")
    if one.worst is not None and (total.worst is None or one.worst > total.worst):
        total.worst, total.worst_case = one.worst, f"seed {seed}: {one.worst_case}"
