"""The claim ``parity``: adapters that both sides read alike pass; what a file or a merge loses is seen."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib

import pytest
import torch

from verify import subjects
from verify.claims import parity
from verify.claims.outcome import Budget
from verify.mutants.base import Wrapped
from verify.strategies import endless, ordered
from verify.subject import Subject

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
FILES = subjects.built_in("cpu")[0].files


def tried(monkeypatch, files, **changes) -> list[str]:
    """The failures of one drawn case, changed."""
    case = dataclasses.replace(
        next(c for c in endless("adapter", (), 0) if len(c.targets) > 1),
        **{"r": 4, "alpha": 8, "targets": ("q_proj", "down_proj"), "ranks": (), "alphas": (), **changes},
    )
    monkeypatch.setattr(parity, "endless", lambda *_: iter([case]))
    return parity.run(Subject("planted", "cpu", files=files), Budget(cases=1), 0).failures


def in_config(**values):
    """A subject that writes other values into its configuration file."""

    def save(model, folder):
        FILES.save(model, folder)
        path = pathlib.Path(folder) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    return Wrapped(FILES, save=save)


@needs_peft
def test_parity_holds_for_the_reference():
    outcome = parity.run(subjects.built_in("cpu")[0], Budget(cases=2), 5)
    assert outcome.failures == []
    assert 0 < outcome.worst < 1


@needs_peft
def test_parity_sees_alpha_and_rslora_lost_in_the_file(monkeypatch):
    told = tried(monkeypatch, in_config(lora_alpha=4))
    assert any("scale in PEFT of the subject's file" in t for t in told)
    assert any("the subject's logits against PEFT's" in t for t in told)
    told = tried(monkeypatch, in_config(use_rslora=False), rslora=True)
    assert any("scale in PEFT of the subject's file" in t for t in told)


@needs_peft
def test_parity_sees_a_target_left_out(monkeypatch):
    def attach(model, config, seed):
        return FILES.attach(model, {**config, "target_modules": config["target_modules"][1:]}, seed)

    told = tried(monkeypatch, Wrapped(FILES, attach=attach))
    assert any(t.startswith("for one configuration PEFT and the subject adapt other modules") for t in told)


@needs_peft
def test_parity_sees_a_merge_that_forgets_one_module(monkeypatch):
    def merge(model):
        last = [m for m in model.modules() if hasattr(m, "lora_B")][-1]
        with torch.no_grad():
            last.lora_B.weight.zero_()
        return FILES.merge(model)

    told = tried(monkeypatch, Wrapped(FILES, merge=merge))
    assert any(t.startswith("merged weight of model.layers.1.mlp.down_proj") for t in told)
    assert any(t.startswith("transformers' logits of the merged model") for t in told)


@needs_peft
def test_parity_sees_one_bit_of_one_tensor(monkeypatch):
    def state(model):
        found = {name: t.clone() for name, t in FILES.state(model).items()}
        first = next(iter(found.values()))
        first[0, 0] = torch.nextafter(first[0, 0], torch.tensor(9.0))
        return found

    told = tried(monkeypatch, Wrapped(FILES, state=state))
    assert any("PEFT has of the subject's file other bits in" in t for t in told)


@needs_peft
def test_parity_sees_an_unmerge_by_subtraction(monkeypatch):
    def merge_and_back(model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                delta = module.scaling * (module.lora_B.weight @ module.lora_A.weight)
                with torch.no_grad():
                    module.weight.add_(delta).sub_(delta)
        return model

    told = tried(monkeypatch, Wrapped(FILES, merge_and_back=merge_and_back))
    assert any(t.startswith("unmerging does not restore the bytes of ['model.layers.0") for t in told)


def test_parity_says_why_it_is_not_tried(monkeypatch):
    assert parity.run(Subject("nothing", "cpu"), Budget(cases=1), 0).reason == "the subject has no adapter files"
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    outcome = parity.run(Subject("files", "cpu", files=FILES), Budget(cases=1), 0)
    assert (outcome.verdict, outcome.reason) == ("not tried", "PEFT is not installed")


def test_adapter_cases_have_patterns_of_targets_and_scales_of_both_kinds():
    cases = ordered("adapter", (), 0)
    assert any(c.rslora for c in cases)
    assert any(c.config()["rank_pattern"] for c in cases)
    assert any(c.config()["alpha_pattern"] for c in cases)
    case = dataclasses.replace(cases[0], r=4, alpha=8, rslora=False, ranks=(("mlp.up_proj", 2),), alphas=())
    assert case.scale("model.layers.0.mlp.up_proj") == 4
    assert case.scale("model.layers.0.mlp.down_proj") == 2
