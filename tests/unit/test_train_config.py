"""TrainConfig: every field is checked, and the schedule never has a step of rate 0."""

from __future__ import annotations

import pytest

from fastlora.errors import InputError
from fastlora.train_config import SCHEDULERS, TrainConfig, learning_rates, total_steps


def config(**fields):
    return TrainConfig(data="d.jsonl", output="out", **fields)


@pytest.mark.parametrize("field, value", [
    ("batch_size", 0), ("batch_size", 1.5), ("batch_size", True), ("micro_batch_tokens", 0),
    ("micro_batch_tokens", "big"), ("max_length", 1), ("steps", 0), ("epochs", 0), ("epochs", float("nan")),
    ("learning_rate", 0), ("learning_rate", float("inf")), ("learning_rate", "1e-4"), ("warmup_ratio", 1.0),
    ("warmup_ratio", -0.1), ("weight_decay", -1), ("max_grad_norm", -1), ("gradient_scale", 3.0),
    ("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1e-4), ("z_loss", float("inf")),
    ("gradient_scale", 0), ("seed", -1), ("seed", 2**63), ("lr_scheduler", "reduce_lr_on_plateau"),
    ("on_bad_row", "ignore"), ("on_long_row", "cut"), ("device", "tpu"), ("dtype", "int8"),
    ("save_dtype", "auto"), ("shuffle", "yes"), ("activation_checkpointing", -1), ("checkpoint_every", -1), ("keep_checkpoints", 0),
    ("model", ""), ("eval_every", -1), ("digest_every", 0.5),
])
def test_train_config_names_the_field_and_its_value(field, value):
    with pytest.raises(InputError) as caught:
        config(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_train_config_batch_is_the_product_and_refuses_another():
    assert config().batch_size == 16
    assert config(micro_batch_size=4, gradient_accumulation_steps=8).batch_size == 32
    assert config(micro_batch_size=4).batch_size == 4
    assert config(batch_size=32, micro_batch_size=4, gradient_accumulation_steps=8).batch_size == 32
    with pytest.raises(InputError, match="batch_size = 16"):
        config(batch_size=16, micro_batch_size=4, gradient_accumulation_steps=8)


def test_train_config_refuses_pairs():
    with pytest.raises(InputError, match="steps"):
        config(steps=3, epochs=2)
    with pytest.raises(InputError, match="resume"):
        config(resume=True, overwrite=True)


def test_train_config_short_dtype_names():
    assert config(dtype="bf16").dtype == "bfloat16"


# What transformers asks for where a schedule cannot do without.
NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps, ratio", [(1, 0.03), (2, 0.5), (10, 0.3), (40, 0.0)])
def test_learning_rates_never_zero(name, steps, ratio):
    made = config(lr_scheduler=name, lr_scheduler_kwargs=NEEDED.get(name, {}), warmup_ratio=ratio, learning_rate=1e-3)
    rates = learning_rates(made, steps)
    assert len(rates) == steps
    assert min(rates) > 0
    assert max(rates) <= 1e-3


def test_learning_rates_hands_settings_to_the_schedule():
    def rates(**settings):
        return learning_rates(config(learning_rate=1.0, warmup_ratio=0, **settings), 8)

    lowest = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.25})
    assert 0.25 < lowest[-1] < 0.3 and lowest[-1] == min(lowest)
    held = rates(lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert held[:6] == [1.0] * 6 and held[5] > held[6] > held[7] > 0


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("linear", {"min_lr": 1e-5}, "linear does not take them"),
    ("cosine_with_min_lr", {}, "cosine_with_min_lr does not take them"),
    ("constant", {"timescale": 3}, "constant takes none"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 2}, "step 5 of 8 the rate 0.0"),
    ("linear", [1], "allowed is a dictionary"),
])  # fmt: skip
def test_learning_rates_refuses_settings_by_name(name, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        learning_rates(config(lr_scheduler=name, lr_scheduler_kwargs=settings, warmup_ratio=0), 8)
    assert "lr_scheduler_kwargs" in str(caught.value)


def test_learning_rates_warm_up_evenly_to_the_peak():
    rates = learning_rates(config(warmup_ratio=0.3, learning_rate=4.0), 10)
    assert rates[:4] == [1.0, 2.0, 3.0, 4.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_total_steps_keeps_the_last_short_batch():
    assert total_steps(config(batch_size=4), 9) == 3
    assert total_steps(config(batch_size=4, epochs=2.0), 9) == 6
    assert total_steps(config(batch_size=4, epochs=0.5), 9) == 2
    assert total_steps(config(steps=7), 9) == 7
