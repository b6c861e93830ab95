"""The kill table: every fault against the claim that must catch it, and against the common tolerance rules."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from verify import context, rules
from verify.claims import CLAIMS
from verify.claims.outcome import Budget
from verify.mutants.base import Mutant
from verify.subject import Subject

KILLED, SURVIVED, UNSEEN = "killed", "SURVIVED", "not tried"


@dataclass(frozen=True)
class Kill:
    """One row: ``verdict`` with the first failure's sentence, or why the fault cannot show here.

    ``rules``: for each common tolerance rule whether it would have seen the fault, None where no such test is written.
    """

    mutant: str
    sentence: str
    claim: str
    subject: str
    verdict: str
    cases: int
    told: str
    seconds: float
    group: str = ""
    modelled_on: str = ""
    seen_on: tuple[str, ...] = ()
    rules: dict[str, bool | None] = field(default_factory=dict)


def _check_device(mutant: Mutant, subject: Subject) -> None:
    """A CUDA error stays: whatever is tried after it in this process fails too, and would be counted as killed."""
    error = context.broken()
    if error:
        raise RuntimeError(f"planted fault {mutant.name!r} left the GPU unusable on {subject.name}: {error}")


def try_mutant(mutant: Mutant, subject: Subject, seed: int, most_cases: int = 60, with_rules: bool = False) -> Kill:
    """Plant one fault and run its claim until it fails, for at most ``most_cases`` cases.

    Raises:
        RuntimeError: the fault left the GPU unusable; no more can be tried in this process.
    """

    def row(verdict: str, cases: int, told: str, seconds: float, seen: dict[str, bool | None]) -> Kill:
        return Kill(
            mutant.name, mutant.sentence, mutant.killer, subject.name, verdict, cases, told, seconds, mutant.group,
            mutant.modelled_on, mutant.seen_on, seen,
        )  # fmt: skip

    why = mutant.why_unseen(subject)
    if not why and mutant.killer not in CLAIMS:
        why = f"no claim is called {mutant.killer!r}"
    if why:
        return row(UNSEEN, 0, why, 0.0, {})
    begun = time.monotonic()
    budget = Budget(cases=most_cases, stop_at_failure=True)
    outcome = CLAIMS[mutant.killer].run(mutant.plant(subject), budget, seed)
    _check_device(mutant, subject)
    if outcome.failures:
        verdict, told = KILLED, outcome.failures[0]
    elif outcome.cases == 0:
        verdict, told = UNSEEN, outcome.reason
    else:
        verdict, told = SURVIVED, f"{outcome.cases} cases passed"
    seconds = time.monotonic() - begun
    return row(verdict, outcome.cases, told, seconds, rules.seen_by_rules(mutant, subject) if with_rules else {})
