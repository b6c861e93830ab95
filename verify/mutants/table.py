"""The kill table: every fault against the claim that must catch it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from verify.claims import CLAIMS
from verify.claims.outcome import Budget
from verify.mutants.base import Mutant
from verify.subject import Subject

KILLED, SURVIVED, UNSEEN = "killed", "SURVIVED", "not tried"


@dataclass(frozen=True)
class Kill:
    """One row: ``verdict`` with the first failure's sentence, or why the fault cannot show here."""

    mutant: str
    sentence: str
    claim: str
    subject: str
    verdict: str
    cases: int
    told: str
    seconds: float


def try_mutant(mutant: Mutant, subject: Subject, seed: int, most_cases: int = 60) -> Kill:
    """Plant one fault and run its claim until it fails, for at most ``most_cases`` cases."""
    why = mutant.why_unseen(subject)
    if why:
        return Kill(mutant.name, mutant.sentence, mutant.killer, subject.name, UNSEEN, 0, why, 0.0)
    begun = time.monotonic()
    budget = Budget(cases=most_cases, stop_at_failure=True)
    outcome = CLAIMS[mutant.killer].run(mutant.plant(subject), budget, seed)
    verdict = KILLED if outcome.failures else SURVIVED
    told = outcome.failures[0] if outcome.failures else f"{outcome.cases} cases passed"
    seconds = time.monotonic() - begun
    return Kill(
        mutant.name,
        mutant.sentence,
        mutant.killer,
        subject.name,
        verdict,
        outcome.cases,
        told,
        seconds,
    )
