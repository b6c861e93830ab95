"""merge and unmerge: the merged weight is right to rounding, the base comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.inject import eject, inject, lora_layers
from fastlora.merge import merge, merge_cost, unmerge
from tests.models import raw, tiny_model, tokens


def injected(dtype=torch.float32):
    model = tiny_model("qwen2").to(dtype)
    return inject(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False), seed=1)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)]
)
def test_merge_adds_the_scaled_product_rounded(dtype, bits):
    model = injected(dtype)
    base = {layer.path: layer.weight.detach().double() for layer in lora_layers(model)}
    assert merge(model) is model
    for layer in lora_layers(model):
        product = layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        exact = base[layer.path] + 1.5 * product
        # One rounding to fp32 and one to the dtype (normal numbers), or half the smallest subnormal
        # of fp16.
        bound = exact.abs() * (2.0**-bits + 2.0**-24) + 2.0**-25
        assert ((layer.weight.double() - exact).abs() <= bound).all()
        assert not torch.equal(layer.weight.double(), base[layer.path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_byte(dtype):
    model = injected(dtype)
    before = raw(model.state_dict().items())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    logits = model(tokens()).logits
    merge(model)
    assert raw(model.state_dict().items()) != before
    assert not any(p.requires_grad for p in model.parameters())
    assert unmerge(model) is model
    assert raw(model.state_dict().items()) == before
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(model(tokens()).logits, logits)


def test_merge_cost_is_the_bytes_kept():
    model = injected()
    cost = merge_cost(model)
    merge(model)
    kept = sum(
        layer.kept_base.numel() * layer.kept_base.element_size() for layer in lora_layers(model)
    )
    assert cost == kept == sum(layer.weight.numel() * 4 for layer in lora_layers(model))
    unmerge(model)
    assert all(layer.kept_base is None for layer in lora_layers(model))


def test_unmerge_refuses_without_a_copy():
    model = merge(injected(), keep_base=False)
    assert all(layer.kept_base is None for layer in lora_layers(model))
    with pytest.raises(InputError, match="no copy of the base weight"):
        unmerge(model)
    with pytest.raises(InputError, match="no copy of the base weight"):
        eject(model)


def test_unmerge_refuses_unmerged_and_cast_models():
    model = injected()
    with pytest.raises(InputError, match="not merged"):
        unmerge(model)
    merge(model).to(torch.bfloat16)
    with pytest.raises(InputError, match="was cast from"):
        unmerge(model)


def test_merge_refuses_twice():
    with pytest.raises(InputError, match="merged already"):
        merge(merge(injected()))


def test_merge_refuses_non_finite_and_leaves_the_model_alone():
    model = injected()
    last = list(lora_layers(model))[-1]
    with torch.no_grad():
        last.lora_A.weight[0, 0] = torch.inf
    before = raw(model.state_dict().items())
    with pytest.raises(InputError, match=f"{last.path} is not finite"):
        merge(model)
    assert raw(model.state_dict().items()) == before
    assert not any(layer.merged for layer in lora_layers(model))


def test_eject_of_a_merged_model_restores_or_keeps():
    model = tiny_model()
    base = raw(model.state_dict().items())
    config = LoraConfig(r=4, init_lora_weights=False)
    eject(merge(inject(model, config)))
    assert raw(model.state_dict().items()) == base
    merge(inject(model, config))
    logits = model(tokens()).logits
    eject(model, keep_merged=True)
    changed = raw(model.state_dict().items())
    assert changed.keys() == base.keys() and changed != base
    assert torch.equal(model(tokens()).logits, logits)
