"""Ordinary .grad mode in other people's loops: transformers' Trainer, gradient checkpointing, a
torch optimiser."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastlora.config import LoraConfig
from fastlora.inject import inject, lora_layers
from tests.models import raw, tiny_model, tokens

CONFIG = LoraConfig(r=4, lora_alpha=8)


def adapter_bytes(model) -> dict[str, bytes]:
    return raw((name, p) for name, p in model.named_parameters() if "lora_" in name)


def base_bytes(model) -> dict[str, bytes]:
    return raw((name, p) for name, p in model.named_parameters() if "lora_" not in name)


def train(model, folder, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in tokens(6, 8)]
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=rows).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_inject_trains_three_steps_in_the_transformers_trainer(tmp_path, precision):
    model = inject(tiny_model(), CONFIG, seed=1)
    adapter, base = adapter_bytes(model), base_bytes(model)
    result = train(model, tmp_path, bf16=precision != "fp32")
    assert result.global_step == 3
    after = adapter_bytes(model)
    assert all(after[name] != adapter[name] for name in adapter)
    assert base_bytes(model) == base


def test_inject_trains_in_the_trainer_with_checkpointing(tmp_path):
    plain, checkpointed = (inject(tiny_model(), CONFIG, seed=1) for _ in range(2))
    train(plain, tmp_path)
    train(
        checkpointed,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert adapter_bytes(checkpointed) == adapter_bytes(plain)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_inject_gradients_are_equal_under_checkpointing(reentrant, dropout):
    config = LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False)
    ids = tokens()

    def gradients(checkpointing: bool) -> dict[str, bytes]:
        model = inject(tiny_model(), config, seed=1)
        # What transformers asks of a frozen model: reentrant checkpointing needs an input with a
        # gradient.
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(8)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return raw((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)

    plain = gradients(False)
    assert len(plain) == 28
    assert gradients(True) == plain


def test_inject_gradients_accumulate_for_a_torch_optimiser():
    model, ids = inject(tiny_model(), CONFIG, seed=1), tokens()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    before = adapter_bytes(model)
    model(input_ids=ids, labels=ids).loss.backward()
    once = [p.grad.clone() for p in parameters]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(parameters, once, strict=True))
    optimiser.step()
    after = adapter_bytes(model)
    # B is 0 at the start, so the gradient of A is exactly 0 and A stays; B moves.
    assert all((after[name] == before[name]) == ("lora_A" in name) for name in before)
    assert all(layer.weight.grad is None for layer in lora_layers(model))
