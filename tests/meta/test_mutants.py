"""The kill table in short: every fault of the linear and the optimiser, and some of the trainer, on
CPU.

``python -m verify --mutants`` tries them all.
"""

from __future__ import annotations

import pytest

from verify import runner, subjects
from verify.claims import CLAIMS
from verify.mutants import MUTANTS
from verify.mutants.base import Mutant
from verify.mutants.table import KILLED, SURVIVED, UNSEEN, Kill, try_mutant
from verify.plain import SUBJECT
from verify.subject import Subject

FROM_TRAINER = ("normalisation by micro-batch mean", "dropout ignored", "frozen weight touched")
QUICK = [m for m in MUTANTS if m.part != "trainer" or m.name in FROM_TRAINER]


@pytest.fixture(scope="module")
def reference() -> Subject:
    return subjects.built_in("cpu")[0]


@pytest.mark.parametrize("mutant", QUICK, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_is_killed_by_the_claim_it_names(mutant, reference):
    kill = try_mutant(mutant, reference, seed=0)
    assert kill.verdict == KILLED, kill.told
    assert not kill.told.startswith("raised"), "a fault that crashes proves nothing about the bound"


def test_mutants_have_one_name_each_and_name_a_claim():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 30
    assert {m.killer for m in MUTANTS} == set(CLAIMS)


def test_mutants_kill_on_a_subject_of_another_maker():
    accuracy = [m for m in MUTANTS if m.killer == "accuracy"][:6]
    verdicts = {m.name: try_mutant(m, SUBJECT, seed=1).verdict for m in accuracy}
    assert set(verdicts.values()) == {KILLED}, verdicts


def test_mutant_that_cannot_show_says_why():
    trainer = next(m for m in MUTANTS if m.part == "trainer")
    kill = try_mutant(trainer, SUBJECT, seed=0)
    assert kill.verdict == UNSEEN
    assert kill.told == "the subject has no trainer"


def test_surviving_mutant_fails_the_run():
    harmless = Mutant("nothing", "nothing is wrong", "linear", "accuracy", lambda part: part)
    kill = try_mutant(harmless, SUBJECT, seed=0, most_cases=2)
    assert kill.verdict == SURVIVED
    assert runner.failed([], [kill])
    assert not runner.failed([], [Kill(**{**kill.__dict__, "verdict": KILLED})])
    assert runner.failed([], [Kill(**{**kill.__dict__, "verdict": UNSEEN})])
