"""One adapter for 24 ways of cutting ten global batches on a GPU: real weights and text, the 8B shape, further families in the small.

Real weights: ``pytest --model DIR``, the folder of the demo's model (``fastlora demo`` says where it put it).
"""

from __future__ import annotations

import pathlib
import sysconfig

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastlora import demo_data, setup
from fastlora.config import SEVEN
from fastlora.data import make_row
from fastlora.encode import encode_pair
from tests import split_cases as cases
from tests.fuse_cases import FAMILIES
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

UNEVEN = [9 + 97 * i % 500 for i in range(cases.ROWS * cases.STEPS)]
OTHERS = [dict(r=8, lora_dropout=0.1), dict(r=64, use_rslora=True), dict(r=64, use_rslora=True, lora_dropout=0.1)]


def shaped():
    """(how to make a model of the 8B shape with 4 layers, rows)."""
    shape = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=4,
        vocab_size=128256, max_position_embeddings=4096,
    )  # fmt: skip

    def build():
        torch.manual_seed(0)
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)

    return build, cases.random_rows(UNEVEN, 128256)


def real(folder: str | None):
    """(how to load the demo's model, rows of real text)."""
    if folder is None:
        pytest.skip("no real model: give pytest --model DIR, the folder of the demo's model")
    tokenizer = setup.load_tokenizer(folder)
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    rows = []
    for line, example in enumerate(demo_data.read_examples(library), 1):
        ids, supervised = encode_pair(tokenizer, example.prompt, example.completion)
        if len(ids) <= 512:
            rows.append(make_row(ids, supervised, line, "pair"))
        if len(rows) == cases.ROWS * cases.STEPS:
            break
    return lambda: setup.load_model(folder, dtype=torch.bfloat16, device="cuda"), rows


def made(what: str, request):
    return shaped() if what == "8b shape" else real(request.config.getoption("--model"))


@pytest.mark.parametrize("what", ["8b shape", "real weights and text"])
def test_adamw_gives_one_adapter_for_24_splits_of_ten_steps(what, request):
    build, rows = made(what, request)
    subject = cases.Subject(build(), r=8)
    cases.check(subject, rows, cases.ALL)
    cases.check_control(subject, rows, cases.ALL[:6])


@pytest.mark.parametrize("what", ["8b shape", "real weights and text"])
def test_adamw_gives_one_adapter_for_every_split_whatever_the_adapter(what, request):
    build, rows = made(what, request)
    digests = {cases.check(cases.Subject(build(), **lora), rows, cases.FEW, steps=6).digest for lora in OTHERS}
    assert len(digests) == len(OTHERS)  # dropout, rank and scaling change what is trained


@pytest.mark.parametrize("lora", [dict(r=8), dict(r=64, lora_dropout=0.1)], ids=("r8", "r64 dropout"))
def test_adamw_gives_one_adapter_for_every_split_with_the_head_among_the_targets(lora):
    build, rows = shaped()
    subject = cases.Subject(build(), target_modules=[*SEVEN, "lm_head"], **lora)
    assert {"lm_head.lora_A.weight", "lm_head.lora_B.weight"} < subject.start.keys()
    cases.check(subject, rows, cases.FEW, steps=6)
    cases.check_control(subject, rows, cases.ALL[:6])


@pytest.mark.parametrize("family", FAMILIES)
def test_adamw_gives_one_adapter_for_every_split_of_a_small_family(family):
    settings = {**FAMILIES[family], "max_position_embeddings": 512}
    model = tiny_model(family, **settings).to("cuda", torch.bfloat16)
    rows = cases.random_rows([5 + 41 * i % 150 for i in range(3 * cases.ROWS)], 96)
    subject = cases.Subject(model, r=8, lora_dropout=0.1)
    cases.check(subject, rows, cases.FEW[:4], steps=3)
    cases.check_control(subject, rows, cases.ALL[:6], steps=1)
