"""Weights of rows, LoRA+ and a mixture of experts on a GPU: the same adapter for two cuts wherever the run claims it."""

from __future__ import annotations

import pytest
import torch

from tests.models import EXPERTS
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
def test_trainer_on_experts_trains_the_attention_and_claims_nothing(tmp_path, model_type):
    size = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 330, "max_position_embeddings": 512}
    model = family_model(model_type, **size | EXPERTS[model_type]).to("cuda", torch.bfloat16)
    result, _, printed = train(tmp_path, "run", model=model, steps=3)
    assert "do not run in fixed blocks" in printed or ": equal" in printed
    assert result.losses[-1][1] < result.losses[0][1]
