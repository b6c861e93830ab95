"""The claims, by name: each a module with NAME, STATEMENT and ``run(subject, budget, seed)``."""

from __future__ import annotations

from types import ModuleType

from verify.claims import accuracy, gradients, guards, invariance, parity, repeat, splits, updates

_MODULES = (accuracy, splits, updates, repeat, invariance, gradients, guards, parity)
CLAIMS: dict[str, ModuleType] = {module.NAME: module for module in _MODULES}
