"""Weights of rows: the objective they say, one adapter for every cut, and rows that cannot be weighed refused by line."""

from __future__ import annotations

import json
import math

import pytest

from fastlora import packing, stream
from fastlora.data import read_rows
from fastlora.errors import InputError
from fastlora.replay import replay
from fastlora.setup import Objective
from tests.unit.loss_reference import reference
from tests.unit.rounding import within
from tests.unit.tiny_run import tiny_model, train, write_rows
from tests.unit.tiny_tokenizer import make_tokenizer

WEIGHTS = (0.3, 1, 2.5, 7, 1.0, 0.125, 3, 0.7, 1e3, 1, 0.01, 2)


def weighted(path, values=WEIGHTS):
    """The tiny run's rows with a weight each."""
    rows = [json.loads(line) for line in write_rows(path).read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"weight": w}) + "\n" for row, w in zip(rows, values, strict=True)))
    return path


@pytest.mark.parametrize("known", [True, False], ids=("known head", "logits"))
def test_objective_multiplies_each_row_by_its_weight(tmp_path, known):
    rows = read_rows(weighted(tmp_path / "rows.jsonl"), make_tokenizer(), max_length=512).rows[:3]
    batch = packing.collate(rows, packing.sample_ids(rows), 16)
    assert batch.weights == WEIGHTS[:3]
    model = tiny_model().requires_grad_(False)
    objective, seen = Objective(model), []
    if not known:
        objective.head = None

    def keep(_module, _inputs, output):
        output.requires_grad_().retain_grad()
        seen.append(output)

    model.model.norm.register_forward_hook(keep)
    with stream.use(batch.stream):
        loss = objective(batch)
        loss.total.backward()
    hidden, gradient = seen[0][0].detach(), seen[0].grad[0]
    values, totals = [], 0.0
    for (start, stop), weight in zip(batch.stream.spans, batch.weights):
        wanted = reference(hidden[start:stop], model.lm_head.weight, batch.labels[start:stop])
        # The weight as fp32 and the product: two roundings more. Where torch multiplies dlogits instead, one of them and the
        # sums over the vocabulary's products are of weighted terms, each rounded as in the plain one.
        bound = weight * (wanted.gradient_bound * (1 + 2.0**-22) + 3 * 2.0**-24 * wanted.gradient.abs())
        assert within(gradient[start:stop], weight * wanted.gradient, bound)
        values.append(weight * wanted.loss)
        totals += weight * (wanted.loss_bound + wanted.loss * 2.0**-24 * batch.supervised)
    assert abs(loss.total.item() - math.fsum(values)) <= totals + 2.0**-23 * math.fsum(values)
    for found, value in zip(loss.documents.tolist(), values):
        assert abs(found - value) <= totals
    with stream.use(batch.stream):
        plain = objective.plain()(batch)
    assert plain.documents.sum().item() != loss.documents.sum().item()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trainer_with_weights_gives_one_adapter_for_every_cut(tmp_path, dropout):
    data = weighted(tmp_path / "weighted.jsonl")
    lora = {"lora_dropout": dropout}
    found = [train(tmp_path, f"cut{cut}", micro_batch_tokens=cut, data=data, steps=2, lora=lora)[0] for cut in (160, 4096)]
    assert found[0].digest == found[1].digest
    assert found[0].losses == found[1].losses
    plain, *_ = train(tmp_path, "plain", steps=2, lora=lora)
    ones = train(tmp_path, "ones", data=weighted(tmp_path / "ones.jsonl", (1,) * 12), steps=2, lora=lora)[0]
    assert ones.digest == plain.digest != found[0].digest


def test_trainer_with_weights_is_replayed_to_the_bit(tmp_path):
    data = weighted(tmp_path / "weighted.jsonl")
    train(tmp_path, "run", data=data, steps=2)
    again = replay(tmp_path / "run", 2, model=tiny_model(), tokenizer=make_tokenizer())
    assert again.different_step is None
    losses = {s.line: s.loss for s in again.sequences}
    assert 0 < max(losses.values()) < 20  # nats a token, whatever the weight


def test_supervised_weight_is_exact_in_any_order(tmp_path):
    rows = read_rows(weighted(tmp_path / "rows.jsonl"), make_tokenizer()).rows
    wanted = math.fsum(row.weight * row.supervised for row in rows)
    assert packing.supervised_weight(rows) == packing.supervised_weight(rows[::-1]) == wanted
    plain = [row for row in rows if row.weight == 1]
    assert packing.supervised_weight(plain) == sum(row.supervised for row in plain)


def test_row_key_names_the_weight(tmp_path):
    """Rows of equal tokens and another weight must not swap their dropout masks with the order of the batch."""
    row = {"prompt": "one", "completion": " two"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | extra) + "\n" for extra in ({}, {"weight": 1}, {"weight": 2}, {"weight": 2.0})))
    keys = [row.key for row in read_rows(path, make_tokenizer()).rows]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize("weight", [0, -1, "2", True, None, 1e-9, 1e9])
def test_read_rows_refuses_a_weight_by_line(tmp_path, weight):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "one", "completion": " two"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"weight": weight}) + "\n")
    with pytest.raises(InputError, match="line 2: 'weight' is"):
        read_rows(path, make_tokenizer())
