"""Adapters on experts in PEFT itself, both ways: its names, its logits and its gradients.

The truth is PEFT's model in float64, the yardstick what PEFT's model in fp32 is away from it.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastlora
from fastlora.adapter import adapter_state, load_adapter, save_adapter
from fastlora.digest import digest
from fastlora.inject import lora_layers
from tests.models import EXPERTS, ON_EXPERTS, tiny_model, tokens

# PEFT looks for keys of patterns among modules alone, and warns of those that match a parameter.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
IDS = tokens(2, 24)
CASES = {
    "attention and both": ON_EXPERTS,
    "both alone": ON_EXPERTS | {"target_modules": []},
    "gate and up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "down": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "of one layer": {
        "target_modules": ["v_proj"],
        "target_parameters": ["layers.1.mlp.experts.down_proj", "0.mlp.experts.gate_up_proj"],
    },
    "patterns, rsLoRA": ON_EXPERTS
    | {
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "rank_pattern": {r"0\.mlp\.experts\.down_proj": 7, "experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 20, "o_proj": 3},
    },
}
SIZE = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


def base(model_type):
    model = tiny_model(model_type, initializer_range=0.1, **EXPERTS[model_type]).eval()
    model.set_experts_implementation("eager")  # the one that takes float64
    return model


def results(model):
    """(logits, gradients of A and B by PEFT's names) of one text loss, in float64."""
    logits = model(IDS).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    names = [n.replace(".default", "") if n.startswith("base_model") else f"base_model.model.{n}" for n in named]
    return {"logits": logits.detach().double()} | {n: g.double() for n, g in zip(names, gradients)}


def check_same(ours, theirs) -> None:
    """Logits and every gradient agree with PEFT's to rounding, while the base model's logits are far away."""
    mine, other, truth = results(ours), results(theirs), results(copy.deepcopy(theirs).double())
    assert mine.keys() == other.keys()
    for name, exact in truth.items():
        error, yardstick = (mine[name] - exact).norm(), (other[name] - exact).norm()
        # tolerance-rule: another order of the same fp32 sums; PEFT's own error is the yardstick, floored at four units
        assert error <= 4 * yardstick + 2.0**-22 * exact.norm(), name
        assert exact.norm() > 2.0**-10, name
    bare = base(ours.config.model_type)(IDS).logits
    assert (bare - truth["logits"]).norm() > 2.0**-10 * truth["logits"].norm()


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
@pytest.mark.parametrize("case", CASES)
def test_save_adapter_of_experts_is_the_same_in_peft(case, model_type, tmp_path):
    ours = fastlora.inject(base(model_type), fastlora.LoraConfig(**SIZE, **CASES[case]), seed=1)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(model_type), tmp_path / "ours", is_trainable=True).eval()
    state, mine = peft.get_peft_model_state_dict(theirs), adapter_state(ours)
    assert state.keys() == mine.keys()
    assert all(torch.equal(state[key], mine[key]) for key in mine)
    assert digest(ours) == digest(state)
    check_same(ours, theirs)


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
@pytest.mark.parametrize("case", CASES)
def test_load_adapter_of_experts_that_peft_wrote(case, model_type, tmp_path):
    fields = {"target_modules": ["q_proj", "v_proj"]} | CASES[case]
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base(model_type), peft.LoraConfig(**SIZE, **fields, task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(base(model_type), tmp_path / "theirs")
    for layer in lora_layers(ours):
        assert layer.scaling == theirs.get_submodule(f"base_model.model.{layer.path}").scaling["default"]
    check_same(ours, theirs)
    # into a model that has the adapter already, and back into a file
    for layer in lora_layers(ours):
        layer.reset(False, torch.Generator().manual_seed(0))
    save_adapter(load_adapter(ours, tmp_path / "theirs"), tmp_path / "again")
    check_same(load_adapter(base(model_type), tmp_path / "again"), theirs)


def test_load_adapter_of_peft_that_names_parameters_alone(tmp_path):
    """PEFT leaves target_modules at null where it knows no default for the model."""
    fields = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    theirs = peft.get_peft_model(base("mixtral"), peft.LoraConfig(**SIZE, **fields))
    theirs.peft_config["default"].target_modules = None
    theirs.save_pretrained(tmp_path)
    assert '"target_modules": null' in (tmp_path / "adapter_config.json").read_text()
    ours = load_adapter(base("mixtral"), tmp_path)
    assert [layer.target for layer in lora_layers(ours)] == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]
    check_same(ours, theirs.eval())


def test_check_same_sees_one_expert_in_anothers_place(tmp_path):
    ours = fastlora.inject(base("mixtral"), fastlora.LoraConfig(**SIZE, **ON_EXPERTS), seed=1)
    theirs = peft.PeftModel.from_pretrained(base("mixtral"), save_adapter(ours, tmp_path), is_trainable=True).eval()
    layer = next(layer for layer in lora_layers(ours) if "experts" in layer.target)
    swapped = layer.lora_A.weight.detach().view(4, 3, -1)[[1, 0, 2, 3]].reshape(layer.lora_A.weight.shape)
    with torch.no_grad():
        layer.lora_A.weight.copy_(swapped)
    with pytest.raises(AssertionError, match="logits"):
        check_same(ours, theirs)
