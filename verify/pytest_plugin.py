"""Claims in one's own test suite: the fixture ``verify_claim``, and ``--verify-cases`` and ``--verify-seed``.

Installed with the harness (entry point ``pytest11``), so a test only asks for the fixture::

    @pytest.mark.parametrize("claim", ["accuracy", "splits", "repeat"])
    def test_my_kernel(verify_claim, claim):
        verify_claim(my_kernel.SUBJECT, claim, cases=20)

A claim that fails raises an AssertionError with the failures and a case to paste; one without a case on this machine skips
the test with the reason: it is never green.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from verify.claims.outcome import Outcome

SHRINK_SECONDS = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    group = parser.getgroup("verify")
    group.addoption("--verify-cases", type=int, default=None, help="cases of each claim, whatever a test asks for")
    group.addoption("--verify-seed", type=int, default=0, help="seed that fixes the cases of every claim [0]")


@pytest.fixture
def verify_claim(request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    """``verify_claim(subject, claim, cases=20)``: hold a claim against a subject; the outcome if it held.

    ``subject`` is a ``verify.subject.Subject`` or its name, ``module:object``.
    """
    asked = request.config.getoption("--verify-cases")
    seed = request.config.getoption("--verify-seed")

    def check(subject, claim: str, cases: int = 20) -> Outcome:
        # Imported here: a test session that asks for no claim does not load torch.
        from verify import replay, runner
        from verify.claims import CLAIMS
        from verify.subject import BadSubject

        if claim not in CLAIMS:
            raise BadSubject(f"claim: {claim!r}; allowed are {', '.join(CLAIMS)}")
        found = runner.load_subject(subject) if isinstance(subject, str) else subject
        (outcome,) = runner.run_claims(
            [found], [claim], seconds=None, cases=asked or cases, seed=seed, after_each=lambda _: None
        )
        if outcome.failures:
            told = [f"{claim} does not hold for {found.name}", *outcome.failures]
            case = replay.in_sentence(outcome.failures[0])
            if case is not None:
                small = replay.shrunk(found, claim, case, SHRINK_SECONDS, seed)
                told.append(f"to see it again: verify.replay.replay(subject, {claim!r}, {small!r})")
            raise AssertionError("\n".join(told))
        if not outcome.cases:
            pytest.skip(f"{claim} not tried: {outcome.reason}")
        return outcome

    return check
