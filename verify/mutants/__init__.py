"""Planted faults: each wraps a subject, and names the claim that must catch it; a survivor fails."""

from __future__ import annotations

from verify.mutants import linear, optimizer, rows, trainer
from verify.mutants.base import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *linear.MUTANTS,
    *trainer.MUTANTS,
    *optimizer.MUTANTS,
    *rows.MUTANTS,
)
