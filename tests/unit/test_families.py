"""The table of families: head_of gives the model's own logits, RoPE kinds that look at the batch
are named."""

from __future__ import annotations

import pytest
import torch

from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.families import FAMILIES, batch_dependent_rope, family_of, head_of
from fastlora.inject import inject, lora_layers
from tests.models import EXPERTS, tiny_model, tokens


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_head_of_gives_the_models_own_logits(model_type):
    special = EXPERTS | {"granite": {"logits_scaling": 3.0}, "gemma3_text": {"final_logit_softcapping": 5.0}}
    extra = special.get(model_type, {})
    model, ids = tiny_model(model_type, **extra).eval(), tokens()
    with torch.no_grad():
        decoder, weight, softcap, scale, lora = head_of(model)
        hidden = decoder(ids)
        exact = hidden.double() @ weight.double().T * scale
        size = hidden.double().abs() @ weight.double().abs().T * scale
        if softcap is not None:
            exact = softcap * torch.tanh(exact / softcap)
        found = model(ids).logits.double()
    # A sum of H fp32 products in any order, then a division and a soft-cap (three roundings and a
    # tanh, whose slope is at most 1 and whose own error is at most 4 units): gamma_(H + 8) of the
    # sum of absolute products.
    unit = 2.0**-24
    terms = hidden.shape[-1] + 8
    bound = terms * unit / (1 - terms * unit) * size
    assert lora is None
    assert (family_of(model).softcap_field is None) == (softcap is None)
    assert ((found - exact).abs() <= bound).all()
    assert (found.abs() > bound).any()


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
@pytest.mark.parametrize("names", [["q_proj", "gate_proj"], ["experts"], ["down_proj"], ".*experts.*"])
def test_inject_refuses_experts_as_modules_and_says_what_to_give(model_type, names):
    model = tiny_model(model_type, **EXPERTS[model_type])
    with pytest.raises(InputError) as caught:
        inject(model, LoraConfig(r=2, target_modules=names))
    assert "target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']" in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_parameters())
    inject(model, LoraConfig(r=2))
    assert {layer.path.rpartition(".")[2] for layer in lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_head_of_unknown_family_and_classifier_is_none():
    model = tiny_model()
    assert head_of(model.model) is None
    model.config.model_type = "unheard-of"
    assert head_of(model) is None


def test_head_of_decoder_takes_position_ids():
    model, ids = tiny_model().eval(), tokens(1)
    decoder = head_of(model).decoder
    places = torch.arange(ids.shape[1])[None]
    assert torch.equal(decoder(ids, places), decoder(ids))
    assert not torch.equal(decoder(ids, places * 3), decoder(ids))


def test_batch_dependent_rope_names_the_kind():
    assert batch_dependent_rope(tiny_model("gemma3_text")) is None
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "dynamic" in batch_dependent_rope(model)


def test_batch_dependent_rope_looks_into_every_layer_type():
    model = tiny_model("gemma3_text")
    model.config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    assert "longrope" in batch_dependent_rope(model)
