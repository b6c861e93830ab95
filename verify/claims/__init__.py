"""The claims, by name: each a module with NAME, STATEMENT and ``run(subject, budget, seed)``."""

from __future__ import annotations

from types import ModuleType

from verify.claims import accuracy, splits, updates

CLAIMS: dict[str, ModuleType] = {module.NAME: module for module in (accuracy, splits, updates)}
