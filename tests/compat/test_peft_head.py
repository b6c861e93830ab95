"""An adapter on lm_head in PEFT itself, both ways: logits, files, and the copy of the head's weight that PEFT saves beside it."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora.adapter import WEIGHTS_FILE, adapter_state, load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.inject import inject, lora_layers
from fastlora.merge import merge
from fastlora.vllm_export import export_for_vllm
from tests.models import tiny_model, tokens
from verify.logits import logit_bound

VOCABULARY = 40
IDS = tokens(1, 5, VOCABULARY)
COPY = "base_model.model.lm_head.base_layer.weight"
CASES = {
    "names": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "head alone": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["lm_head"]},
    "regex": {"r": 3, "lora_alpha": 6, "target_modules": r".*v_proj|lm_head", "rank_pattern": {"lm_head": 5}},
}


def base():
    return tiny_model(vocab_size=VOCABULARY).eval()


def check_same(ours, theirs) -> None:
    with torch.no_grad():
        mine, other, bare = ours(IDS).logits, theirs(IDS).logits, base()(IDS).logits
    bound = logit_bound(theirs, IDS)
    assert ((mine.double() - other.double()).abs() <= bound).all()
    assert (mine.double() - bare.double()).abs().max() > 100 * bound.max()


@pytest.mark.parametrize("case", CASES)
def test_save_adapter_with_the_head_in_peft_gives_the_same_logits(case, tmp_path):
    ours = inject(base(), LoraConfig(**CASES[case], init_lora_weights=False), seed=1)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    mine, state = adapter_state(ours), peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert "base_model.model.lm_head.lora_A.weight" in mine
    assert state.keys() == mine.keys() == load_file(tmp_path / WEIGHTS_FILE).keys()
    assert all(torch.equal(state[key], mine[key]) for key in mine)
    check_same(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_load_adapter_of_peft_with_the_head_gives_the_same_logits(case, tmp_path):
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        base(), peft.LoraConfig(**CASES[case], init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base(), tmp_path)
    assert "lm_head" in [layer.path for layer in lora_layers(ours)]
    check_same(ours, theirs)
    check_same(load_adapter(ours, tmp_path), theirs)  # into the adapters it has
    check_same(merge(ours), theirs)


def test_load_adapter_takes_peft_s_copy_of_the_head_if_it_is_the_models(tmp_path):
    config = peft.LoraConfig(**CASES["names"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert torch.equal(tensors[COPY], base().lm_head.weight)
    load_adapter(base().bfloat16(), tmp_path)  # rounded as the model is
    export_for_vllm(tmp_path, tmp_path / "vllm")
    assert COPY not in load_file(tmp_path / "vllm" / WEIGHTS_FILE)
    tensors[COPY][3, 3] += 1
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    model = base()
    with pytest.raises(InputError, match=r"lm_head.base_layer.weight is not the weight of the model's lm_head"):
        load_adapter(model, tmp_path)
    assert not list(lora_layers(model))


def test_all_linear_leaves_the_head_out_as_peft_does():
    ours = inject(base(), LoraConfig(r=2, target_modules="all-linear"))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert names == {layer.path for layer in lora_layers(ours)}
    assert "lm_head" not in names
