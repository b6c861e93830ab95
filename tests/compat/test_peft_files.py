"""Adapter files in PEFT itself, both ways: the same logits in fp32 to a derived rounding bound."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import fastlora.config
from fastlora.adapter import adapter_state, load_adapter, save_adapter
from fastlora.inject import inject, lora_layers
from tests.models import tiny_model, tokens
from verify.logits import logit_bound

VOCABULARY = 40
IDS = tokens(1, 5, VOCABULARY)

CASES = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["o_proj", "up_proj"],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "gate_proj", "down_proj"],
        "rank_pattern": {r"1\.mlp\.down_proj": 7, "down_proj": 3, "q_proj": 5},
        "alpha_pattern": {
            r"model.layers.0.self_attn.q_proj": 2,
            r"layers\.\d+\.mlp\.gate_proj": 20,
        },
    },
    "regex": {"r": 3, "lora_alpha": 6, "target_modules": r".*\.1\..*\.(q|k)_proj|.*mlp\.up_proj"},
    "exclude": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
    },
    "exclude-regex": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": r"model\.layers\.0\..*",
    },
    "layers": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "all-linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}
# The more special key comes first although it sorts last: PEFT's own files sort the keys and lose
# that.
ORDER = {**CASES["patterns"], "rank_pattern": {r"layers\.1\.mlp\.down_proj": 7, "down_proj": 3}}


def base(model_type: str = "llama"):
    return tiny_model(model_type, vocab_size=VOCABULARY).eval()


def check_same(ours, theirs, model_type: str = "llama") -> None:
    """The logits agree within the bound, while the base model's are far outside it (the bound sees
    the adapter)."""
    with torch.no_grad():
        mine, other, bare = ours(IDS).logits, theirs(IDS).logits, base(model_type)(IDS).logits
    bound = logit_bound(theirs, IDS)
    assert ((mine.double() - other.double()).abs() <= bound).all()
    assert (mine.double() - bare.double()).abs().max() > 100 * bound.max()


@pytest.mark.parametrize("case", [*CASES, "pattern-order"])
def test_save_adapter_in_peft_gives_the_same_logits(case, tmp_path):
    config = fastlora.config.LoraConfig(**CASES.get(case, ORDER), init_lora_weights=False)
    ours = inject(base(), config, seed=1)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    state = peft.get_peft_model_state_dict(theirs)
    mine = adapter_state(ours)
    assert state.keys() == mine.keys()
    assert all(torch.equal(state[key], mine[key]) for key in mine)
    check_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_load_adapter_of_peft_gives_the_same_logits(case, tmp_path):
    config = peft.LoraConfig(**CASES[case], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    theirs = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base(), tmp_path)
    assert all(
        layer.scaling == theirs.get_submodule(f"base_model.model.{layer.path}").scaling["default"]
        for layer in lora_layers(ours)
    )
    check_same(ours, theirs)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma"])
def test_adapter_of_other_families_agrees_both_ways(model_type, tmp_path):
    config = fastlora.config.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    ours = inject(base(model_type), config, seed=1)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(model_type), tmp_path / "ours").eval()
    check_same(ours, theirs, model_type)
    theirs.save_pretrained(tmp_path / "theirs")
    check_same(load_adapter(base(model_type), tmp_path / "theirs"), theirs, model_type)


def test_logit_bound_sees_a_wrong_scale(tmp_path):
    config = fastlora.config.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    ours = inject(base(), config, seed=1)
    theirs = peft.PeftModel.from_pretrained(base(), save_adapter(ours, tmp_path)).eval()
    next(lora_layers(ours)).scaling *= 1.01
    with torch.no_grad():
        difference = (ours(IDS).logits.double() - theirs(IDS).logits.double()).abs()
    assert (difference > logit_bound(theirs, IDS)).any()


def test_save_adapter_config_means_the_same_to_peft(tmp_path):
    config = fastlora.config.LoraConfig(**CASES["patterns"], lora_dropout=0.1)
    save_adapter(inject(base(), config), tmp_path)
    read = peft.LoraConfig.from_pretrained(tmp_path)
    for name, value in CASES["patterns"].items():
        assert getattr(read, name) == (set(value) if isinstance(value, list) else value)
    assert (read.lora_dropout, read.bias, read.task_type) == (0.1, "none", "CAUSAL_LM")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() <= peft.LoraConfig().to_dict().keys()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_load_adapter_refuses_what_peft_wrote_with_more(fields, name, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **fields)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(fastlora.config.InputError, match=name):
        load_adapter(base(), tmp_path)
