"""Planted faults: each wraps a subject, and names the claim that must catch it; a survivor fails."""

from __future__ import annotations

from verify.mutants import files, indexing, library, maths, optimizer, order, precision, rows, trainer
from verify.mutants.base import GROUPS, Mutant

_ALL = [m for module in (maths, indexing, precision, order, optimizer, files, trainer, library, rows) for m in module.MUTANTS]
MUTANTS: tuple[Mutant, ...] = tuple(sorted(_ALL, key=lambda m: GROUPS.index(m.group)))
