"""An adapter on lm_head in a whole model: the fused loss is that of the model's own logits, merged and not, in a run too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastlora import packing, stream
from fastlora.adapter import adapter_state, load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.coverage import coverage
from fastlora.data import read_rows
from fastlora.digest import digest
from fastlora.exact import exact
from fastlora.families import head_of
from fastlora.inject import eject, inject, lora_layers
from fastlora.merge import merge, unmerge
from fastlora.setup import Objective
from tests.models import tiny_model
from tests.unit import tiny_run
from tests.unit.tiny_tokenizer import make_tokenizer

TERMS = {"label_smoothing": 0.2, "z_loss": 1e-2}
LORA = dict(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj", "lm_head"])
# fp32 against fp32 in another order: products of up to 300 terms and a softmax, through two layers
CLOSE = 2.0**-24 * 4000


def batch_of(tmp_path, rows: int = 3):
    found = read_rows(tiny_run.write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer(), max_length=512).rows
    return packing.collate(found, packing.sample_ids(found), 16)


def untied(family: str):
    """A tiny model with a head of its own; Gemma 2's has a soft-cap, Granite's a scale."""
    if family == "llama":
        return tiny_run.tiny_model(tied=False)
    own = {"gemma2": {"final_logit_softcapping": 5.0}, "granite": {"logits_scaling": 3.0}}[family]
    return tiny_model(family, vocab_size=320, max_position_embeddings=512, tie_word_embeddings=False, **own)


def adapted(family: str = "llama", **more):
    return inject(untied(family), LoraConfig(**LORA, init_lora_weights=False, **more), seed=2)


def gradients(model, batch, known: bool, weights=None, **terms) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and .grad of every adapter tensor, by the fused loss or by the model's own logits."""
    objective = Objective(model, **terms)
    if not known:
        objective.head = None
    if weights is not None:
        batch = dataclasses.replace(batch, weights=weights)
    model.zero_grad()
    with stream.use(batch.stream):
        loss = objective(batch)
        loss.backward()
    return loss.total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "terms", "dropout"),
    [("llama", {}, 0.0), ("llama", TERMS, 0.2), ("gemma2", TERMS, 0.0), ("gemma2", {}, 0.2), ("granite", TERMS, 0.2)],
)
def test_objective_with_an_adapter_on_the_head_is_that_of_the_models_own_logits(tmp_path, family, terms, dropout):
    model, batch = adapted(family, lora_dropout=dropout), batch_of(tmp_path)
    # the masks of both ways are those of the stream: a module's path and a token's place
    ours, ours_grad = gradients(model, batch, True, (0.5, 1.0, 3.0), **terms)
    own, own_grad = gradients(model, batch, False, (0.5, 1.0, 3.0), **terms)
    assert abs(ours - own) <= CLOSE * own
    assert {"lm_head.lora_A.weight", "lm_head.lora_B.weight"} < ours_grad.keys()
    for name, wanted in own_grad.items():
        assert float((ours_grad[name] - wanted).norm()) <= CLOSE * float(wanted.norm()), name
    objective = Objective(model, **terms)
    objective.head = objective.head._replace(lora=None)
    with stream.use(batch.stream), torch.no_grad():
        bare = objective(dataclasses.replace(batch, weights=(0.5, 1.0, 3.0))).total.item()
    assert abs(ours - bare) > 5 * CLOSE * own  # a loss that reads the frozen weight alone is told apart


def test_exact_sums_of_the_head_are_its_gradients(tmp_path):
    model, batch = adapted(), batch_of(tmp_path)
    _, wanted = gradients(model, batch, True)
    with exact(model), stream.use(batch.stream):
        Objective(model, gradient_scale=8.0)(batch).backward()
    for name, total in zip(("lora_A", "lora_B"), model.lm_head.sums):
        found, grad = total.gradient(8.0), wanted[f"lm_head.{name}.weight"]
        assert float((found - grad).norm()) <= CLOSE * float(grad.norm())


def test_evaluation_of_an_adapter_on_the_head_adds_nothing_and_drops_nothing(tmp_path):
    model, batch = adapted(lora_dropout=0.5).eval(), batch_of(tmp_path)
    with exact(model), stream.use(batch.stream), torch.no_grad():
        loss = Objective(model)(batch).total.item()
        assert not any(s.total.any() for m in lora_layers(model) for s in m.sums)
    plain = adapted().eval()
    with stream.use(batch.stream), torch.no_grad():
        assert Objective(plain)(batch).total.item() == loss


def test_merged_head_gives_the_loss_of_its_adapter_and_unmerge_its_bytes(tmp_path):
    model, batch = adapted().eval(), batch_of(tmp_path)
    base = model.lm_head.weight.detach().clone()

    def loss() -> float:
        with stream.use(batch.stream), torch.no_grad():
            return Objective(model)(batch).total.item()

    before = loss()
    merge(model)
    assert abs(loss() - before) <= CLOSE * before
    assert not torch.equal(model.lm_head.weight, base)
    unmerge(model)
    assert torch.equal(model.lm_head.weight, base)
    assert loss() == before


def test_save_adapter_and_load_adapter_with_the_head(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny_run.tiny_model(tied=False), tmp_path / "a")
    assert "base_model.model.lm_head.lora_A.weight" in adapter_state(again)
    assert digest(again) == digest(model)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_coverage_and_head_of_tell_of_an_adapter_on_the_head():
    model = adapted()
    (row,) = [row for row in coverage(model) if row.path == "lm_head"]
    assert (row.backend, row.reason) == ("reference", "device is cpu, in training inside the fused loss")
    assert head_of(model).lora is model.lm_head
    model.config.model_type = "unheard-of"
    (row,) = [row for row in coverage(model) if row.path == "lm_head"]
    assert row.reason == "device is cpu"
    assert head_of(eject(model)) is None


def trained_by_two_cuts(folder, **settings) -> list:
    """What two runs gave, of rows in several micro-batches and in one."""
    held = str(tiny_run.write_rows(folder / "held.jsonl", 3, seed=9))
    return [
        tiny_run.train(
            folder, f"cut{cut}", model=tiny_run.tiny_model(tied=False), micro_batch_tokens=cut, eval_data=held, **settings
        )[0]
        for cut in (160, 4096)
    ]


def test_trainer_with_an_adapter_on_the_head_gives_one_adapter_for_every_cut(tmp_path):
    found = trained_by_two_cuts(tmp_path, steps=2, lora={**LORA, "lora_dropout": 0.1}, gradient_scale=1024.0)
    assert found[0].digest == found[1].digest
    assert found[0].losses == found[1].losses
    assert found[0].held_out == found[1].held_out


def test_trainer_with_an_adapter_on_the_head_alone(tmp_path):
    found = trained_by_two_cuts(tmp_path, steps=4, lora={"r": 4, "target_modules": ["lm_head"]})
    assert found[0].digest == found[1].digest
    assert found[0].held_out[0][1] > found[0].held_out[-1][1]
