"""fastlora advise: the rules, the memory formula against what was counted and measured, and what it writes."""

from __future__ import annotations

import json
import pathlib
import tomllib

import pytest
import torch

from bench.layer_cost import load, tiny
from bench.memory import shape_facts
from bench.shapes import shape_named
from fastlora import advise, cli_advise
from fastlora.advice_memory import adapter_bytes, columns, kept_a_token, lora_parameters, memory, padded, usable
from fastlora.errors import InputError
from tests.unit.tiny_run import run_command, save_model, tiny_model, write_rows

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("advise")
    save_model(made / "model")
    write_rows(made / "rows.jsonl", count=40)
    return made


def facts(shape: str = "llama-3.1-8b", **more) -> dict:
    base = {"goal": "general", "model": shape_facts(shape_named(shape)), "data": None, "card": None, "rank": None, "new_vocabulary": False}
    return base | more


def some_data(**more) -> dict:
    lengths = dict.fromkeys(advise.rules()["quantiles"], 500) | {"100": 9000, "50": 100}
    return {"rows": 20000, "skipped": 0, "tokens": 4_000_000, "padded": 5_000_000, "supervised": 1_000_000, "squares": 10**9,
            "quantiles": lengths, "bytes_per_token": 4.0} | more


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_kept_bytes_are_those_counted_in_a_fused_layer(kind):
    assert kept_a_token(advise.facts_of(tiny(kind)), 4, size=4) == load()[kind]["kept_bytes_a_token"]


def test_columns_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from fastlora.kernels.columns import Columns
    from fastlora.kernels.launch import padded_rank

    for rank in (1, 4, 16, 17, 64, 100, 256):
        assert padded(rank) == padded_rank(rank)
        for count in (1, 2, 3):
            assert columns(count, rank) == Columns((rank,) * count, (0,) * count, (8,) * count, (1.0,) * count).columns


def test_adapter_bytes_are_those_of_a_model_in_training():
    import fastlora

    model = tiny_model()
    found = advise.facts_of(model)
    fastlora.inject(model, fastlora.LoraConfig(r=4), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert lora_parameters(found, 4) == sum(p.numel() for p in trained)
    # fp32 master, exp_avg and exp_avg_sq, and the int64 sum
    own = sum(p.numel() for p in trained) * (torch.float32.itemsize * 3 + torch.int64.itemsize)
    copies = found.layers * sum(columns(len(n), 4) * (k + sum(n)) for k, n in found.groups) * torch.bfloat16.itemsize
    assert adapter_bytes(found, 4, advise.rules()) == own + copies


def test_peaks_are_within_a_tenth_of_those_measured():
    """The published run's rows of fastlora: the issue's target is 10 %."""
    result = json.loads((ROOT / "bench/results/2026-11-25-h200-step-llama-3.1-8b.json").read_text())
    seen = 0
    for row in result["rows"]:
        name = row["system"]
        if name.startswith("fastlora") and "float" not in name and row.get("peak_bytes"):
            found = memory(facts()["model"], row["rank"], row["padded_tokens"], int("ckpt" in name), advise.rules())
            assert 0.9 <= found.peak / row["peak_bytes"] <= 1.1, name
            seen += 1
    assert seen >= 5


def test_meta_model_has_the_facts_of_the_real_one(folder):
    assert advise.model_facts(str(folder / "model")) == advise.facts_of(tiny_model())


@pytest.mark.parametrize("goal", advise.GOALS)
def test_every_goal_follows_the_table(goal):
    table = advise.rules()["goals"][goal]
    found = advise.decide(facts(goal=goal, data=some_data()))
    assert found["lora"]["r"] in table["ranks"]
    assert found["lora"]["lora_dropout"] == 0 and found["train"]["learning_rate"] == table["learning_rate"]


def test_rank_grows_with_what_the_data_hold():
    model = shape_facts(shape_named("smollm2-135m"))
    ranks = [advise.decide(facts("smollm2-135m", goal="domain", data=some_data(supervised=n)))["lora"]["r"] for n in (10**5, 10**8)]
    assert ranks == [64, 128]
    assert lora_parameters(model, 64) * 2 >= 10**5 and lora_parameters(model, 64) * 2 < 10**8


def test_scale_goes_on_without_a_jump_where_rslora_begins():
    def scale(rank: int) -> float:
        lora = advise.decide(facts(goal="domain", rank=rank))["lora"]
        return lora["lora_alpha"] / (rank**0.5 if lora["use_rslora"] else rank)

    assert [advise.decide(facts(rank=r))["lora"]["use_rslora"] for r in (16, 64, 65, 128)] == [False, False, True, True]
    assert scale(64) == 2 and scale(256) == 1 and scale(64) > scale(65) > scale(128)


def test_smaller_cards_give_up_micro_batch_then_activations_then_rank():
    found = {c["gib"]: c for c in advise.cards(facts(goal="domain", data=some_data()))}
    assert not found[8]["fits"] and not found[12]["fits"]
    tokens = [found[g]["train"]["micro_batch_tokens"] for g in (24, 48, 80)]
    assert tokens == sorted(tokens)
    assert found[24]["train"]["activation_checkpointing"] == 1 and found[80]["train"]["activation_checkpointing"] == 0
    assert found[24]["lora"]["r"] <= found[80]["lora"]["r"]
    for gib in (24, 48, 80):
        assert found[gib]["memory"]["peak"] <= usable(gib * GIB, advise.rules()) and found[gib]["seconds_per_epoch"] > 0
    assert found[80]["seconds_per_epoch"] < found[48]["seconds_per_epoch"] < found[24]["seconds_per_epoch"]


def test_length_limit_is_a_quantile_where_the_longest_row_does_not_fit():
    wide, narrow = (advise.decide(facts(data=some_data(), card=g * GIB))["train"] for g in (80, 20))
    assert (wide["max_length"], wide["on_long_row"]) == (9088, "refuse")
    assert (narrow["max_length"], narrow["on_long_row"]) == (512, "skip")
    assert advise.decide(facts("smollm2-135m", data=some_data(quantiles=dict.fromkeys(advise.rules()["quantiles"], 10**6))))[
        "train"]["max_length"] == shape_facts(shape_named("smollm2-135m")).positions


@pytest.mark.parametrize(
    ("more", "verdicts"),
    [
        ({}, []),
        ({"new_vocabulary": True}, ["new_vocabulary"]),
        ({"data": some_data(bytes_per_token=1.2)}, ["unknown_text"]),
        ({"data": some_data(supervised=10**12)}, ["capacity"]),
    ],
)
def test_wrong_tool_is_said(more, verdicts):
    assert advise.decide(facts(**more))["verdicts"] == verdicts


def test_rules_cite_sources_that_exist():
    table = advise.rules()
    used = {s for entry in (*table["reasons"].values(), *table["verdicts"].values()) for s in entry["sources"]}
    assert used <= table["sources"].keys()
    assert table["sources"].keys() <= used


def test_data_facts_are_those_of_the_rows(folder):
    from fastlora.data import read_rows
    from fastlora.setup import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    found = advise.data_facts(str(folder / "rows.jsonl"), tokenizer)
    lengths = sorted(map(len, read_rows(folder / "rows.jsonl", tokenizer).rows))
    assert found["quantiles"]["100"] == lengths[-1] and found["quantiles"]["50"] == lengths[20]
    assert found["tokens"] == sum(lengths) and found["squares"] == sum(n * n for n in lengths)


def test_advise_toml_is_accepted_by_train(folder, capsys, tmp_path):
    places = ("--model", folder / "model", "--data", folder / "rows.jsonl")
    code, out, err = run_command(capsys, "advise", *places, "--memory", "8GiB", "--format", "toml", "--output", tmp_path / "run")
    assert code == 0, err
    (tmp_path / "run.toml").write_text(out)
    code, _, err = run_command(capsys, "train", "--config", tmp_path / "run.toml", "--epochs", 0.1)
    assert code == 0, err
    stored = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    asked = tomllib.loads(out)
    for table in ("train", "lora"):
        assert {k: stored[table][k] for k in asked[table] if k != "epochs"} == {k: v for k, v in asked[table].items() if k != "epochs"}


def test_every_format_says_the_same(folder, capsys):
    arguments = ("advise", "--model", folder / "model", "--data", folder / "rows.jsonl", "--memory", "24GiB", "--goal", "domain", "--rank", 128)
    outs = {f: run_command(capsys, *arguments, "--format", f)[1] for f in cli_advise.FORMATS}
    lora = json.loads(outs["json"])["lora"]
    assert tomllib.loads(outs["toml"])["lora"] == lora == {"r": 128, "lora_alpha": 16, "lora_dropout": 0, "use_rslora": True}
    assert "--rank 128 --lora-alpha 16 --lora-dropout 0 --use-rslora" in outs["command"]
    assert "r=128," in outs["python"] and "use_rslora=True," in outs["python"]
    compile(outs["python"], "advice", "exec")
    assert "LoRA: yes" in outs["table"] and "8 GiB" in outs["table"] and "arXiv:2106.09685" in outs["table"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--goal", "best"], "goal = 'best'"), (["--format", "yaml"], "format = 'yaml'"), (["--memory", "lots"], "memory = 'lots'"),
        (["--memory", "0GiB"], "memory = '0GiB'"), (["--rank", "0"], "rank = 0"), (["--data", "none.jsonl"], "none.jsonl"),
        (["--memory", "600MiB", "--format", "toml"], "memory = '600MiB'"),
    ],
)
def test_bad_argument_is_refused_by_name(folder, capsys, arguments, named):
    code, _, err = run_command(capsys, "advise", "--model", folder / "model", *arguments)
    assert code == 2 and named in err and len(err.splitlines()) == 1


def test_memory_sizes():
    sizes = {"24GiB": 24 * GIB, "24": 24 * GIB, "24 gb": 24 * 10**9, "1.5G": 3 * GIB // 2, "100b": 100}
    assert {text: cli_advise.card_bytes(text) for text in sizes} == sizes


def test_model_without_known_projections_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(InputError, match="gpt2"):
        advise.facts_of(model)
