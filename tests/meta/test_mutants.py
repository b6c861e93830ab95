"""The kill table in short: every fault but those that need whole trainings, and some of these, on CPU.

``python -m verify --mutants`` tries them all.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from concurrent.futures.process import BrokenProcessPool

import pytest

from verify import parallel, publish, rules, runner, sharpness, subjects
from verify.claims import CLAIMS
from verify.mutants import MUTANTS
from verify.mutants.base import EVERYWHERE, GROUPS, PARTS, Mutant
from verify.mutants.table import KILLED, SURVIVED, UNSEEN, Kill, try_mutant
from verify.plain import SUBJECT
from verify.subject import Subject

FROM_TRAINER = ("mean of means", "frozen weight touched")
QUICK = [m for m in MUTANTS if m.killer in CLAIMS and (m.part != "trainer" or m.name in FROM_TRAINER)]


@pytest.fixture(scope="module")
def reference() -> Subject:
    return subjects.built_in("cpu")[0]


@pytest.mark.parametrize("mutant", QUICK, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_is_killed_by_the_claim_it_names(mutant, reference):
    if mutant.why_unseen(reference):
        # A kernel's own faults: the interpreter or a GPU shows them.
        assert "cpu" not in mutant.seen_on
        return
    kill = try_mutant(mutant, reference, seed=0)
    assert kill.verdict == KILLED, kill.told
    assert not kill.told.startswith("raised"), "a fault that crashes proves nothing about the bound"


def test_mutants_have_one_name_each_and_say_all_about_themselves():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 100
    assert {m.killer for m in MUTANTS} == set(CLAIMS)
    assert {m.group for m in MUTANTS} == set(GROUPS)
    for mutant in MUTANTS:
        assert mutant.part in PARTS
        assert mutant.seen_on
        assert set(mutant.seen_on) <= set(EVERYWHERE)
        assert mutant.sentence


def test_published_table_has_every_fault_and_no_survivor():
    text = publish.PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|]+) \| [^|]+ \| `(\w+)` \| ([\w ]+) \|", text, re.MULTILINE)
    assert sorted((name, claim) for name, claim, _ in listed) == sorted((m.name, m.killer) for m in MUTANTS)
    assert {verdict for _, _, verdict in listed} <= {KILLED, UNSEEN}
    assert [name for name, _, verdict in listed if verdict == UNSEEN] == [m.name for m in MUTANTS if "cpu" not in m.seen_on]


def test_sixteen_mutants_are_modelled_on_faults_that_shipped():
    reports = {m.modelled_on for m in MUTANTS if m.modelled_on}
    assert len(reports) >= 16
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in reports)


def test_mutants_kill_on_a_subject_of_another_maker():
    accuracy = [m for m in MUTANTS if m.killer == "accuracy" and m.part == "linear" and not m.why_unseen(SUBJECT)]
    verdicts = {m.name: try_mutant(m, SUBJECT, seed=1).verdict for m in accuracy[:20]}
    assert set(verdicts.values()) == {KILLED}, verdicts


def test_mutant_that_cannot_show_says_why():
    trainer = next(m for m in MUTANTS if m.part == "trainer")
    kill = try_mutant(trainer, SUBJECT, seed=0)
    assert kill.verdict == UNSEEN
    assert kill.told == "the subject has no trainer"
    library = next(m for m in MUTANTS if m.name == "one mask shared by projections")
    assert try_mutant(library, SUBJECT, seed=0).told == "a fault of fastlora's own functions"


def test_surviving_mutant_fails_the_run():
    harmless = Mutant("nothing", "nothing is wrong", "linear", "accuracy", lambda part: part)
    kill = try_mutant(harmless, SUBJECT, seed=0, most_cases=2)
    assert kill.verdict == SURVIVED
    assert runner.failed([], [kill])
    assert not runner.failed([], [Kill(**{**kill.__dict__, "verdict": KILLED})])
    assert runner.failed([], [Kill(**{**kill.__dict__, "verdict": UNSEEN})])


def test_rules_accept_sound_subjects_and_miss_what_the_base_product_hides(reference):
    harmless = Mutant("nothing", "nothing is wrong", "linear", "accuracy", lambda part: part)
    assert not any(rules.seen_by_rules(harmless, reference).values())
    by_name = {m.name: m for m in MUTANTS}
    seen = rules.seen_by_rules(by_name["LoRA left out"], reference)
    assert not seen["norm 1e-2"]
    assert not seen["within 0.3"]
    assert all(rules.seen_by_rules(by_name["edge tile of dA left out"], reference).values())


def test_sharpness_catches_what_is_a_little_outside_its_bound():
    rows = list(sharpness.measure(SUBJECT, 0))
    assert {row.what for row in rows} >= {"y", "dx", "da", "db", "first step of B"}
    for row in rows:
        assert 0 < row.typical <= row.used <= 1
        assert row.caught <= row.always <= 2
        assert row.ratio < 100


def test_mutants_in_two_processes_give_the_table_of_one():
    again = functools.partial(runner.subjects_of, "verify.plain:SUBJECT", "cpu")
    tasks = parallel.all_tasks(again(), 0)
    assert [task.mutant for task in tasks] == [*range(len(MUTANTS)), None]
    one, two = ([dataclasses.replace(kill, seconds=0.0) for kill in parallel.tried(tasks[:4], again(), again, jobs)] for jobs in (1, 2))
    assert one == two
    assert [kill.mutant for kill in two] == [mutant.name for mutant in MUTANTS[:4]]
    assert {kill.verdict for kill in two} == {KILLED}


def test_a_worker_that_cannot_begin_ends_the_run():
    nothing = functools.partial(runner.subjects_of, "verify.plain:NOTHING", "cpu")
    tasks = parallel.all_tasks([SUBJECT], 0)[:2]
    with pytest.raises(BrokenProcessPool):
        list(parallel.tried(tasks, [SUBJECT], nothing, 2))
