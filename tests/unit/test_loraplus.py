"""LoRA+: B has a rate of its own, everywhere else nothing changes."""

from __future__ import annotations

import pytest
import torch

from fastlora.config import LoraConfig
from fastlora.digest import adapter_tensors
from fastlora.errors import InputError
from fastlora.inject import inject
from fastlora.optim import AdamW
from tests.models import tiny_model, tokens
from tests.unit.tiny_run import train


def step(ratio, lr=1e-2):
    """The adapter before and after one step on ordinary gradients."""
    model = inject(tiny_model(), LoraConfig(r=4, init_lora_weights=False), seed=0)
    optimizer = AdamW(model, lr, loraplus_lr_ratio=ratio)
    before = {n: t.clone() for n, t in adapter_tensors(model).items()}
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return before, adapter_tensors(model), optimizer


def test_adamw_multiplies_the_rate_of_b_alone():
    before, plus, optimizer = step(16.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 16e-2]
    _, slow, _ = step(1.0)
    _, fast, _ = step(1.0, lr=16e-2)
    for name in before:
        assert torch.equal(plus[name], (fast if "lora_B" in name else slow)[name])
        assert not torch.equal(plus[name], before[name])


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), float("nan")])
def test_adamw_refuses_a_bad_ratio(ratio):
    with pytest.raises(InputError, match="loraplus_lr_ratio"):
        step(ratio)


def test_trainer_with_loraplus_gives_one_adapter_for_every_cut_and_resumes(tmp_path):
    settings = {"loraplus_lr_ratio": 8.0, "steps": 4, "checkpoint_every": 1}
    whole = [train(tmp_path, f"cut{cut}", micro_batch_tokens=cut, **settings)[0].digest for cut in (160, 4096)]
    train(tmp_path, "halves", stop_after=2, **settings)
    resumed, *_ = train(tmp_path, "halves", resume=True, **settings)
    assert whole[0] == whole[1] == resumed.digest
    plain, *_ = train(tmp_path, "plain", steps=4)
    assert plain.digest != whole[0]
    with pytest.raises(InputError, match="loraplus_lr_ratio was 8.0, now it is 4.0"):
        train(tmp_path, "halves", resume=True, **(settings | {"loraplus_lr_ratio": 4.0}))


def test_trainer_rates_of_b_follow_the_schedule(tmp_path):
    _, trainer, _ = train(tmp_path, "run", loraplus_lr_ratio=8.0, steps=3, lr_scheduler="cosine")
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [trainer.rates[-1], 8.0 * trainer.rates[-1]]
