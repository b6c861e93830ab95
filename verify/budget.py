"""A budget of seconds that ends on time: the longest case so far says whether another one fits."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from verify.claims.outcome import Budget, Outcome
from verify.subject import BadSubject

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


@dataclass
class Timed(Budget):
    """As its parent; of a budget of seconds it also stops before a case of which less than half would fit."""

    longest: float = 0.0
    last: float = 0.0
    done: int = 0

    def more(self, done: int) -> bool:
        """Whether to begin another case after ``done`` of them."""
        now = time.monotonic() - self.begun
        if done > self.done:
            # The first case also draws the list of them all, so it says little about the others.
            taken = now - self.last
            self.longest = taken if self.done <= 1 else max(self.longest, taken)
            self.last, self.done = now, done
        if not super().more(done):
            return False
        return done == 0 or self.seconds is None or self.seconds - now > self.longest / 2


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a CI's time limit) raises KeyboardInterrupt too, so that the report is written in both."""

    def stop(number, frame) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def unfinished(error: BaseException, claim: str) -> Outcome | None:
    """What a claim had found when ``error`` went through it: the outcome in its frames, without the case it was in."""
    trace, found = error.__traceback__, None
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, Outcome) and value.claim == claim:
                found = value
        trace = trace.tb_next
    if found is not None and found.cases:
        found.note(f"interrupted in case {found.cases}, which is not counted")
        found.cases -= 1
        found.reason = found.reason or ("" if found.cases else "interrupted in its first case")
    return found
