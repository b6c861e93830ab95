"""fastlora's adapters in PEFT's files, for the claim ``parity``."""

from __future__ import annotations

import torch

import fastlora
from fastlora.adapter import adapter_state


class FastloraFiles:
    """``inject``, ``save_adapter``, ``load_adapter`` and ``merge`` on models of transformers."""

    def attach(self, model: torch.nn.Module, config: dict, seed: int) -> torch.nn.Module:
        """Adapters whose A and B are both drawn."""
        return fastlora.inject(model, fastlora.LoraConfig(**config, init_lora_weights=False), seed=seed)

    def save(self, model: torch.nn.Module, folder: str) -> None:
        """The two files."""
        fastlora.save_adapter(model, folder)

    def load(self, model: torch.nn.Module, folder: str) -> torch.nn.Module:
        """The two files onto a bare model."""
        return fastlora.load_adapter(model, folder)

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """A plain transformers model with the adapter inside its weights."""
        return fastlora.eject(fastlora.merge(model), keep_merged=True)

    def merge_and_back(self, model: torch.nn.Module) -> torch.nn.Module:
        """Merged, and unmerged again."""
        return fastlora.unmerge(fastlora.merge(model))

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A and B by PEFT's names."""
        return adapter_state(model)
