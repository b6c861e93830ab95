"""fastlora: Triton kernels for LoRA fine-tuning, exact under every split of the batch.

Importing is silent, needs no GPU and compiles nothing; each public name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AdamW": "fastlora.optim",
    "DropoutKey": "fastlora.ops.dropout",
    "InputError": "fastlora.errors",
    "LoraConfig": "fastlora.config",
    "TrainConfig": "fastlora.train_config",
    "Trainer": "fastlora.train",
    "TrainingError": "fastlora.errors",
    "coverage": "fastlora.coverage",
    "digest": "fastlora.digest",
    "eject": "fastlora.inject",
    "exact": "fastlora.exact",
    "inject": "fastlora.inject",
    "load_adapter": "fastlora.adapter",
    "lora_linear": "fastlora.ops.lora_linear",
    "merge": "fastlora.merge",
    "save_adapter": "fastlora.adapter",
    "unmerge": "fastlora.merge",
    "update_report": "fastlora.report",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
