"""Planted faults tried in several processes: each patches a copy of the library of its own, so they cannot meet."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from verify import sharpness
from verify.mutants import MUTANTS
from verify.mutants.table import Kill, try_mutant
from verify.sharpness import Sharpness
from verify.shuffle import shuffled_programs
from verify.subject import Subject

# A fault is mostly Python on one core, and compiling on a GPU; beyond this a GPU's memory and launches are shared by too many.
MOST_JOBS = 6


def default_jobs() -> int:
    """One process for two cores."""
    return max(1, min(MOST_JOBS, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Task:
    """A fault by its number, or with None the sharpness of the claims, on the subject of that number."""

    subject: int
    mutant: int | None
    seed: int

    def run(self, subjects: list[Subject]) -> Kill | list[Sharpness]:
        """What came out of it."""
        with shuffled_programs(self.seed):
            if self.mutant is None:
                return list(sharpness.measure(subjects[self.subject], self.seed))
            return try_mutant(MUTANTS[self.mutant], subjects[self.subject], self.seed, with_rules=True)


def all_tasks(subjects: list[Subject], seed: int) -> list[Task]:
    """Every fault on every subject, then the sharpness on it."""
    return [Task(i, number, seed) for i in range(len(subjects)) for number in (*range(len(MUTANTS)), None)]


def tried(
    tasks: list[Task], subjects: list[Subject], again: Callable[[], list[Subject]] | None = None, jobs: int = 1
) -> Iterator[Kill | list[Sharpness]]:
    """What came out of the tasks, in their order whatever ends first.

    Args:
        again: makes the subjects in another process; a function of a module, or a partial one. jobs: processes; with 1 everything runs in this one.
    """
    if jobs == 1:
        yield from (task.run(subjects) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (again, jobs)) as pool:
        try:
            yield from pool.map(_run, tasks)
        except BaseException:
            # an interrupt, above all: nobody waits for what the others are at
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


_subjects: list[Subject] = []


def _begin(again: Callable[[], list[Subject]], jobs: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says what an interrupt means
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    _subjects[:] = again()


def _run(task: Task) -> Kill | list[Sharpness]:
    return task.run(_subjects)
