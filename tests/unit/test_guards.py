"""Silent failures: each is refused by its name, with a sentence and a remedy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_run import tiny_model, train, write_rows
from tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer
from torch import nn

from fastlora import guards, packing, stream
from fastlora.config import LoraConfig
from fastlora.data import IGNORED, read_rows
from fastlora.errors import InputError
from fastlora.exact import lora_modules
from fastlora.guards import SilentFailure
from fastlora.inject import inject
from fastlora.setup import Objective


@pytest.fixture
def rows(tmp_path):
    return read_rows(write_rows(tmp_path / "rows.jsonl"), make_tokenizer(), max_length=512)


def refused(name, call, *arguments):
    with pytest.raises(SilentFailure) as caught:
        call(*arguments)
    assert caught.value.name == name
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and message.endswith(".") and message.count(". ") >= 1
    return message


def with_row(rows, index, **change):
    changed = list(rows.rows)
    changed[index] = dataclasses.replace(changed[index], **change)
    return dataclasses.replace(rows, rows=changed)


def test_check_rows_passes_good_rows(rows):
    assert guards.check_rows(rows) is None


def test_check_rows_refuses_a_row_without_supervised_token(rows):
    nothing = np.full_like(rows.rows[3].labels, IGNORED)
    assert "line 4" in refused("no-supervised-token", guards.check_rows, with_row(rows, 3, labels=nothing))


def test_check_rows_refuses_labels_of_the_next_token(rows):
    row = rows.rows[2]
    shifted = np.append(row.labels[1:], np.int32(IGNORED))
    assert "line 3" in refused("labels-shifted-twice", guards.check_rows, with_row(rows, 2, labels=shifted))


def test_check_rows_refuses_labels_that_are_no_tokens(rows):
    row = rows.rows[2]
    labels = np.where(row.labels == IGNORED, IGNORED, row.labels + 1).astype(np.int32)
    assert "line 3" in refused("labels-not-tokens", guards.check_rows, with_row(rows, 2, labels=labels))


def test_check_rows_refuses_rows_that_never_end(rows):
    counts = {**rows.counts, "without_end": rows.counts["used"]}
    assert "12 rows" in refused("no-end-token", guards.check_rows, dataclasses.replace(rows, counts=counts))


def test_train_refuses_a_chat_template_without_an_end(tmp_path):
    import io
    import json

    from rich.console import Console

    from fastlora.train import Trainer
    from fastlora.train_config import TrainConfig

    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = make_tokenizer(PLAIN_TEMPLATE.replace("<|stop|>", ""))
    config = TrainConfig(data=str(data), output=str(tmp_path / "a"), steps=1)
    with pytest.raises(SilentFailure, match="no-end-token"):
        Trainer(tiny_model(), tokenizer, config, console=Console(file=io.StringIO())).train()
    assert not (tmp_path / "a").exists()


def test_check_batch_refuses_labels_that_are_not_the_next_tokens(rows):
    first = rows.rows[:4]
    batch = packing.collate(first, packing.sample_ids(first), 16)
    assert guards.check_batch(batch) is None
    twice = dataclasses.replace(batch, labels=torch.cat([batch.labels[1:], batch.labels[:1]]))
    refused("labels-shifted-twice", guards.check_batch, twice)
    none = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED), supervised=0)
    refused("no-supervised-token", guards.check_batch, none)


def reach(model, rows):
    guards.check_reached(Objective(model), rows.rows[:3], 16, torch.device("cpu"))


def test_check_reached_leaves_nothing_behind(rows):
    model = inject(tiny_model(), LoraConfig(r=2))
    reach(model, rows)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.exact or (m.sums and m.sums[0].pending) for _, m in lora_modules(model))


def test_check_reached_refuses_an_adapter_that_is_frozen(rows):
    model = inject(tiny_model(), LoraConfig(r=2))
    model.model.layers[1].mlp.up_proj.lora_A.weight.requires_grad_(False)
    assert "layers.1.mlp.up_proj" in refused("adapter-not-reached", reach, model, rows)


def test_check_reached_refuses_a_detached_adapter(rows):
    model = inject(tiny_model(), LoraConfig(r=2))
    layer = model.model.layers[1].self_attn
    forward = layer.v_proj.forward
    layer.v_proj.forward = lambda x: forward(x).detach()
    message = refused("adapter-not-reached", reach, model, rows)
    assert "1 of 14 adapters (model.layers.1.self_attn.v_proj)" in message


def test_check_tokens_refuses_another_models_tokenizer(rows):
    model = tiny_model()
    guards.check_tokens(model, rows.rows)
    model.model.embed_tokens = nn.Embedding(40, 64)
    with pytest.raises(InputError, match=r"line \d+: token \d+ .*0 to 39"):
        guards.check_tokens(model, rows.rows)


class Half(nn.Module):
    def __init__(self, dtype, value):
        super().__init__()
        self.A = nn.Parameter(torch.full((4, 4), value).to(dtype))


@pytest.mark.parametrize("dtype, value", [(torch.bfloat16, 0.02), (torch.float16, 0.9), (torch.bfloat16, 1.0)])
def test_check_update_size_is_the_half_unit_in_the_last_place(dtype, value):
    model = Half(dtype, value)
    stored = model.A[0, 0].item()
    bits = model.A.detach().view(torch.int16) + 1
    unit = bits.view(dtype)[0, 0].item() - stored
    below = unit / 2 * 0.99
    assert "A is torch." in refused("update-below-rounding", guards.check_update_size, model, below)
    assert guards.check_update_size(model, unit / 2) is None
    # What the guard is about: the parameter does not move.
    assert torch.equal((model.A.detach().double() + below).to(dtype), model.A)


def test_check_update_size_leaves_fp32_and_zeros_alone():
    assert guards.check_update_size(Half(torch.float32, 1.0), 1e-12) is None
    assert guards.check_update_size(Half(torch.bfloat16, 0.0), 1e-12) is None


def test_first_not_finite_names_the_first_module(rows):
    model = inject(tiny_model(), LoraConfig(r=2))
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, o: o * float("nan"))
    first = rows.rows[:2]
    batch = packing.collate(first, packing.sample_ids(first), 16)
    with stream.use(batch.stream):
        assert "layers.1.mlp.down_proj" in guards.first_not_finite(Objective(model), batch)


def test_memorising_needs_held_out_loss_to_rise_while_training_loss_falls():
    from fastlora.evaluate import memorising

    falling = [(s, 3.0 - 0.1 * s) for s in range(1, 21)]
    flat = [(s, 3.0) for s in range(1, 21)]
    rises = [(0, 2.0, 0.02), (10, 1.8, 0.02), (20, 1.9, 0.02)]
    assert "memorising" in memorising(falling, rises)
    assert "step 10" in memorising(falling, rises)
    assert memorising(flat, rises) is None
    assert memorising(falling, [(0, 2.0, 0.02), (10, 1.8, 0.2), (20, 1.9, 0.2)]) is None
    assert memorising(falling, [(0, 2.0, 0.02), (20, 1.9, 0.02)]) is None
    assert "step 0" in memorising(falling, [(0, 2.0, 0.02), (20, 2.5, 0.02)])


def test_paired_standard_error_of_equal_weights_is_that_of_the_mean():
    import statistics

    from fastlora.evaluate import Evaluation, paired

    before = Evaluation((4.0, 6.0, 9.0, 5.0), (2, 2, 2, 2))
    after = Evaluation((3.0, 6.5, 7.0, 4.0), (2, 2, 2, 2))
    changes = [(b - a) / 2 for a, b in zip(before.losses, after.losses)]
    change, error = paired(before, after)
    assert change == statistics.mean(changes)
    assert abs(error - statistics.stdev(changes) / 4**0.5) < 1e-12


def test_train_says_when_it_memorises(tmp_path):
    held = write_rows(tmp_path / "held.jsonl", 8, seed=7)
    _, _, printed = train(tmp_path, "a", eval_data=str(held), steps=60, batch_size=12, learning_rate=3e-2,
                          eval_every=20)
    assert "the adapter is memorising" in printed
