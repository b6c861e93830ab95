"""Faults of adapter files, of attaching and of merging; all seen by the claim ``parity``."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from verify.mutants.base import Mutant, Wrapped

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def _read_wrong(change: Callable[[dict], dict]) -> Callable:
    """A loader that reads another configuration than the file holds."""

    def wrap(part):
        def load(model, folder):
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
                path = pathlib.Path(copy, CONFIG)
                path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
                return part.load(model, copy)

        return Wrapped(part, load=load)

    return wrap


def _written_wrong(change: Callable[[dict], dict]) -> Callable:
    """A writer of other tensors than the model holds."""

    def wrap(part):
        def save(model, folder):
            part.save(model, folder)
            path = pathlib.Path(folder, TENSORS)
            save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, {"format": "pt"})

        return Wrapped(part, save=save)

    return wrap


def _attached_wrong(change: Callable[[dict], dict]) -> Callable:
    return lambda part: Wrapped(part, attach=lambda model, config, seed: part.attach(model, change(config), seed))


def _one_missed(config: dict) -> dict:
    """The first of several targets is dropped, with the patterns that name it."""
    targets = config.get("target_modules")
    if not isinstance(targets, list | tuple | set) or len(targets) < 2:
        return config
    missed, *kept = sorted(targets)
    patterns = {
        name: {key: value for key, value in (config.get(name) or {}).items() if key.rpartition(".")[2] != missed}
        for name in ("rank_pattern", "alpha_pattern")
    }
    return {**config, **patterns, "target_modules": kept}


def _one_bit(tensors: dict) -> dict:
    """One element of one tensor is one unit in the last place away."""
    name = sorted(tensors)[0]
    tensor = tensors[name].clone()
    tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.full_like(tensor[0, 0], torch.inf))
    return {**tensors, name: tensor}


def _merges_nothing(part):
    """The merged model is the base."""

    def merge(model):
        bases = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
        merged = part.merge(model)
        with torch.no_grad():
            for held, (_, parameter) in zip(bases.values(), merged.named_parameters()):
                if held.shape == parameter.shape:
                    parameter.copy_(held)
        return merged

    return Wrapped(part, merge=merge)


def _fault(name: str, sentence: str, wrap: Callable, modelled_on: str = "", group: str = "files") -> Mutant:
    return Mutant(name, sentence, "files", "parity", wrap, group=group, modelled_on=modelled_on)


MUTANTS = (
    _fault("alpha lost", "lora_alpha is read as r", _read_wrong(lambda c: {**c, "lora_alpha": c["r"]}),
           "invergent-ai/surogate#173"),
    _fault("rsLoRA lost", "use_rslora is not read", _read_wrong(lambda c: {**c, "use_rslora": False}),
           "sgl-project/sglang#40835"),
    _fault("alpha_pattern lost", "alpha_pattern is not read", _read_wrong(lambda c: {**c, "alpha_pattern": {}}),
           "huggingface/diffusers#14409"),
    _fault("written in bf16", "A and B lose 16 bits on their way to the file",
           _written_wrong(lambda ts: {n: t.bfloat16().to(t.dtype) for n, t in ts.items()})),
    _fault("one bit in the file", "one element is one unit in the last place away", _written_wrong(_one_bit)),
    _fault("a target left out", "one of the target modules gets no adapter", _attached_wrong(_one_missed),
           group="injection"),
    _fault("nothing merged", "the merged model is the base", _merges_nothing, "huggingface/trl#386"),
)  # fmt: skip
