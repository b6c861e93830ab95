"""PEFT's side of the claim ``parity``: adapters read and made by PEFT itself."""

from __future__ import annotations

import os

import torch


def load(model: torch.nn.Module, folder: str | os.PathLike) -> torch.nn.Module:
    """PEFT's model from what somebody wrote into ``folder``."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder).eval()


def attach(model: torch.nn.Module, config: dict, seed: int) -> torch.nn.Module:
    """A fresh adapter of PEFT's own, with B drawn too, so that it acts.

    Patterns in alphabetical order: ``save_pretrained`` sorts them, and the first that matches a module counts, so with
    another order PEFT's file says something else than the model it came from, to PEFT itself too.
    """
    import peft

    config = config | {name: dict(sorted(config[name].items())) for name in ("rank_pattern", "alpha_pattern")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, made).eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A and B by the names they have in the file."""
    import peft

    return peft.get_peft_model_state_dict(model)
