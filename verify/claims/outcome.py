"""What a claim found for one subject, and the budget it works under."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

PASS, FAIL, NOT_TRIED = "pass", "FAIL", "not tried"
MOST_FAILURES = 5


@dataclass
class Budget:
    """Seconds, or a number of cases: ``more()`` says whether to begin another; the first always
    may."""

    seconds: float | None = None
    cases: int | None = None
    stop_at_failure: bool = False
    begun: float = field(default_factory=lambda: time.monotonic())  # looked up at the call: the clock may be another one

    def more(self, done: int) -> bool:
        """Whether another case fits after ``done`` of them."""
        if done == 0:
            return self.cases is None or self.cases > 0
        if self.cases is not None:
            return done < self.cases
        return self.seconds is None or time.monotonic() - self.begun < self.seconds


@dataclass
class Outcome:
    """One row of the report. ``worst``: the largest share of a bound seen, None where bits are
    compared."""

    claim: str
    statement: str
    subject: str
    cases: int = 0
    worst: float | None = None
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """pass, FAIL, or not tried (which is never a pass)."""
        if self.failures:
            return FAIL
        return PASS if self.cases else NOT_TRIED

    def share(self, value: float, sentence: str) -> None:
        """Note a share of a bound; above 1 it is a failure."""
        if self.worst is None or value > self.worst:
            self.worst, self.worst_case = value, sentence
        if not value <= 1.0:
            self.fail(sentence)

    def fail(self, sentence: str) -> None:
        """Note a failure; only the first few are kept in words."""
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(sentence)

    def check(self, condition: bool, sentence: str) -> None:
        """A failure unless ``condition``."""
        if not condition:
            self.fail(sentence)

    def note(self, sentence: str) -> None:
        """A remark for the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
