"""Weights of rows, LoRA+ and a mixture of experts on a GPU: the same adapter for two cuts wherever the run claims it."""

from __future__ import annotations

import pytest
import torch

from fastlora.config import LoraConfig
from fastlora.exact import discard, exact
from fastlora.inject import inject, lora_layers
from tests.models import EXPERTS, ON_EXPERTS, tokens
from tests.models import tiny_model as family_model
from tests.unit.test_weights import weighted
from tests.unit.tiny_run import tiny_model, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"loraplus_lr_ratio": 4.0}], ids=["weights", "weights and LoRA+"])
def test_trainer_with_weights_gives_one_adapter_for_every_cut(tmp_path, dtype, settings):
    data, found = weighted(tmp_path / "weighted.jsonl"), []
    for cut in (512, 4096):
        model = tiny_model().to("cuda", dtype)
        result, _, printed = train(tmp_path, f"cut{cut}", model=model, data=data, steps=2, micro_batch_tokens=cut, **settings)
        found.append(result)
        assert "two ways" in printed or "not claimed" in printed
    if ": equal" in printed:
        assert found[0].digest == found[1].digest
        assert found[0].losses == found[1].losses
    plain, *_ = train(tmp_path, "plain", model=tiny_model().to("cuda", dtype), steps=2, **settings)
    assert plain.digest != found[0].digest


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
@pytest.mark.parametrize("lora", [{}, ON_EXPERTS], ids=["attention", "attention and experts"])
def test_trainer_on_experts_trains_and_claims_nothing(tmp_path, model_type, lora):
    size = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 330, "max_position_embeddings": 512}
    model = family_model(model_type, **size | EXPERTS[model_type]).to("cuda", torch.bfloat16)
    result, trainer, printed = train(tmp_path, "run", model=model, lora=lora, steps=3)
    assert "do not run in fixed blocks" in printed or ": equal" in printed
    assert result.losses[-1][1] < result.losses[0][1]
    assert len(list(lora_layers(trainer.model))) == 2 * (4 + len(lora.get("target_parameters", [])))
    assert all(row["changed"] > 0 for row in result.report["tensors"])


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
def test_experts_on_a_gpu_have_the_gradients_and_sums_of_the_cpu(model_type):
    found = {}
    for device in ("cpu", "cuda"):
        model = family_model(model_type, **EXPERTS[model_type])
        inject(model, LoraConfig(r=3, init_lora_weights=False, **ON_EXPERTS), seed=1).to(device)
        ids = tokens(2, 50).to(device)
        model(ids).logits.square().sum().backward()
        layers = [layer for layer in lora_layers(model) if "experts" in layer.target]
        gradients = [f.weight.grad.cpu() for layer in layers for f in (layer.lora_A, layer.lora_B)]
        model.zero_grad()
        with exact(model):
            model(ids).logits.square().sum().backward()
        found[device] = gradients, [total.gradient(1.0).cpu() for layer in layers for total in layer.sums]
        discard(model)
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"]):
        for one, other in zip(on_cpu, on_gpu):
            # tolerance-rule: fp32 through two layers in two orders of sums; a wrong expert or rank would be off by the whole
            assert (one - other).norm() <= 2.0**-16 * one.norm() > 0
