"""The claims, by name: each a module with NAME, STATEMENT and ``run(subject, budget, seed)``."""

from __future__ import annotations

from types import ModuleType

from verify.claims import accuracy, guards, invariance, parity, repeat, splits, updates

CLAIMS: dict[str, ModuleType] = {m.NAME: m for m in (accuracy, splits, updates, repeat, invariance, guards, parity)}
