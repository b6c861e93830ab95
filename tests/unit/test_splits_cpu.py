"""One adapter for 24 ways of cutting ten global batches, on the CPU; at SmolLM2's width for 1, 2 and 4 threads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastlora import invariant
from fastlora.config import SEVEN
from tests import split_cases as cases
from tests.models import EXPERTS, ON_EXPERTS, tiny_model

LENGTHS = [5 + 11 * i % 57 for i in range(cases.ROWS * cases.STEPS)]
ADAPTERS = {
    "lora r8": dict(r=8),
    "lora r8 dropout": dict(r=8, lora_dropout=0.1),
    "rslora r64": dict(r=64, use_rslora=True),
    "rslora r64 dropout": dict(r=64, use_rslora=True, lora_dropout=0.1),
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_adamw_gives_one_adapter_for_24_splits_of_ten_steps():
    assert len(set(cases.ALL)) == 24
    torch.set_num_threads(1)
    subject = cases.Subject(tiny_model(layers=1), **ADAPTERS["lora r8"])
    rows = cases.random_rows(LENGTHS, 96)
    cases.check(subject, rows, cases.ALL)
    cases.check_control(subject, rows, cases.ALL[:6])


def test_adamw_gives_one_adapter_for_every_split_whatever_the_adapter():
    torch.set_num_threads(1)
    rows, digests = cases.random_rows(LENGTHS, 96), set()
    for lora in list(ADAPTERS.values())[1:]:
        digests.add(cases.check(cases.Subject(tiny_model(layers=1), **lora), rows, cases.FEW, steps=6).digest)
    assert len(digests) == 3  # dropout, rank and scaling change what is trained


def test_adamw_gives_one_adapter_at_smollm2_width_for_1_2_and_4_threads():
    shape = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1, vocab_size=99)
    torch.manual_seed(0)
    subject = cases.Subject(AutoModelForCausalLM.from_config(LlamaConfig(**shape)), r=8)
    rows, found = cases.random_rows([5 + 67 * i % 150 for i in range(2 * cases.ROWS)], 99), set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.add(cases.check(subject, rows, cases.FEW[:4], steps=2).digest)
    assert len(found) == 1


def test_adamw_gives_one_adapter_for_every_split_with_the_head_among_the_targets():
    torch.set_num_threads(1)
    rows, found = cases.random_rows(LENGTHS, 96), []
    for dropout in (0.0, 0.1):
        subject = cases.Subject(tiny_model(layers=1), r=8, lora_dropout=dropout, target_modules=[*SEVEN, "lm_head"])
        assert {"lm_head.lora_A.weight", "lm_head.lora_B.weight"} < subject.start.keys()
        found.append(cases.check(subject, rows, cases.FEW, steps=4).digest)
        cases.check_control(subject, rows, cases.ALL[:3])
    torch.set_num_threads(2)
    assert cases.check(subject, rows, cases.FEW[1:2], steps=4).digest == found[1] != found[0]


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
def test_adamw_gives_one_adapter_of_attention_and_experts_for_every_split(model_type, monkeypatch):
    torch.set_num_threads(1)
    subject = cases.Subject(tiny_model(model_type, layers=1, **EXPERTS[model_type]), r=4, **ON_EXPERTS)
    rows = cases.random_rows(LENGTHS, 96)
    assert len(subject.start) == 2 * (4 + 2)
    one = cases.check(subject, rows, cases.FEW, steps=4)
    torch.set_num_threads(2)
    assert cases.check(subject, rows, cases.FEW[1:2], steps=4).digest == one.digest
    cases.check_control(subject, rows, cases.FEW[:2])
    # Exact sums alone are not enough: without the fixed tiles an expert's tokens of several rows are one chunk.
    monkeypatch.setattr(invariant, "_tile_experts", lambda model, done: None)
    assert len({subject.train(rows, split, steps=2).digest for split in cases.FEW[:2]}) == 2
    named = dict(invariant.make_invariant(subject.model).not_exact)
    assert named["model.layers.0.mlp.experts"] == "LoraExperts: its products do not run in fixed blocks"
