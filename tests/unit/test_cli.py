"""The command line: what bad input does, and a whole run from flags."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny_run import run_command as run
from tiny_run import save_model, write_rows

from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


BAD = {
    "missing model": (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    "typing error in a folder": (["--model", "{tmp}/modle"], "modle"),
    "empty model folder": (["--model", "{tmp}/empty"], "config.json"),
    "rank 0": (["--rank", "0"], "0"),
    "alpha 0": (["--lora-alpha", "0"], "alpha"),
    "negative alpha": (["--lora-alpha", "-1"], "alpha"),
    "dropout 1": (["--lora-dropout", "1"], "dropout"),
    "unknown target": (["--target-modules", "q_porj"], "q_proj"),
    "experts of a model without": (["--target-parameters", "mlp.experts.down_proj"], "target_parameters"),
    "bad dtype": (["--dtype", "int8"], "dtype"),
    "bad scheduler": (["--lr-scheduler", "linera"], "lr_scheduler"),
    "bad tokens": (["--micro-batch-tokens", "many"], "micro_batch_tokens"),
    "two lengths": (["--steps", "1", "--epochs", "1"], "steps"),
    "two batches": (["--batch-size", "4", "--micro-batch-size", "3"], "batch_size"),
    "no row": (["--data", "{tmp}/empty.jsonl"], "no usable row"),
    "missing data": (["--data", "{tmp}/absent.jsonl"], "absent.jsonl"),
    "broken row": (["--data", "{tmp}/broken.jsonl"], "line 2"),
    "too long": (["--max-length", "20"], "--on-long-row"),
    "more than the model has": (["--max-length", "100000"], "max_length"),
    "resume of nothing": (["--resume"], "resume"),
    "bad flag": (["--bogus"], "--bogus"),
    "no number": (["--steps", "three"], "--steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_train_bad_input_exits_2_with_the_message_last_and_writes_nothing(case, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "one two three"}\n{"text": \n')
    data = write_rows(tmp_path / "rows.jsonl")
    before = files(tmp_path)
    extra, expected = BAD[case]
    extra = [a.replace("{tmp}", str(tmp_path)) for a in extra]
    code, out, err = run(capsys, "train", "--model", model, "--data", data, "--output", tmp_path / "out", *extra)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert expected in last
    assert "Traceback" not in err and "╭" not in err + out
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_train_missing_flags_are_named(capsys):
    code, _, err = run(capsys, "train", "--output", "x")
    assert code == 2 and err.strip().splitlines()[-1] == "error: model: missing; give --model"


@pytest.mark.parametrize("flag, value", [("--label-smoothing", 1.0), ("--z-loss", -0.5)])
def test_train_names_a_loss_term_out_of_range(flag, value, capsys):
    code, _, err = run(capsys, "train", "--model", "m", "--data", "d", "--output", "x", flag, value)
    assert code == 2
    assert f"{flag[2:].replace('-', '_')} = {value}" in err.strip().splitlines()[-1]


def test_train_refuses_pickled_weights(model, tmp_path, capsys):
    import shutil

    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(model, tmp_path / "pickled")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    data = write_rows(tmp_path / "rows.jsonl")
    code, _, err = run(capsys, "train", "--model", folder, "--data", data, "--output", tmp_path / "out")
    assert code == 2 and "safetensors" in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_train_runs_no_code_from_a_model_folder(model, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(model, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "planted", "auto_map": {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    data = write_rows(tmp_path / "rows.jsonl")
    code, _, err = run(capsys, "train", "--model", folder, "--data", data, "--output", tmp_path / "out")
    assert code == 2 and "--trust-remote-code" in err.strip().splitlines()[-1]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_train_refuses_a_model_with_missing_weights(model, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = write_rows(tmp_path / "rows.jsonl")
    code, _, err = run(capsys, "train", "--model", folder, "--data", data, "--output", tmp_path / "out")
    assert code == 2 and "layers.0.mlp.up_proj.weight" in err.strip().splitlines()[-1]


def test_train_report_generate_data_and_merge_from_flags(model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    common = ["train", "--model", model, "--data", data, "--steps", 2, "--batch-size", 4, "--rank", 2]
    for name, extra in (("a", []), ("b", ["--micro-batch-tokens", 160]), ("c", ["--learning-rate", 1e-3])):
        code, out, _ = run(capsys, *common, "--output", tmp_path / name, *extra)
        assert code == 0 and "sequences per optimiser step" in out
    md5 = {n: hashlib.md5((tmp_path / n / "adapter_model.safetensors").read_bytes()).hexdigest() for n in "abc"}
    assert md5["a"] == md5["b"] != md5["c"]

    code, out, _ = run(capsys, "report", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0 and all(row["equal"] for row in json.loads(out)["tensors"])
    code, out, _ = run(capsys, "report", tmp_path / "a", tmp_path / "c")
    assert code == 0 and "digests" in out

    code, out, _ = run(capsys, "generate", "--model", model, "--adapter", tmp_path / "a", "--prompt", "hello",
                       "--max-new-tokens", 3, "--device", "cpu")
    assert code == 0 and out.endswith("\n")
    code, out, _ = run(capsys, "data", data, "--model", model, "--line", 3)
    assert code == 0 and "line 3" in out and "supervised" in out

    merge = ["merge", "--model", model, "--adapter", tmp_path / "a", "--output", tmp_path / "merged"]
    code, out, _ = run(capsys, *merge)
    assert code == 0
    code, _, err = run(capsys, *merge)
    assert code == 2 and "holds files" in err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|end|>"


def test_generate_chat_answers_every_line_of_standard_input(model, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "chat")
    make_tokenizer(PLAIN_TEMPLATE).save_pretrained(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nworld\n"))
    code, out, err = run(capsys, "generate", "--model", folder, "--chat", "--max-new-tokens", 3, "--device", "cpu")
    assert (code, err) == (0, "") and out.count("\n") >= 2  # one for each answer, and those it holds


def test_train_resume_needs_the_output_folder_alone(model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl")
    common = ["train", "--model", model, "--data", data, "--steps", 4, "--batch-size", 4, "--rank", 2,
              "--checkpoint-every", 1, "--lora-dropout", 0.1, "--learning-rate", 1e-2]
    run(capsys, *common, "--output", tmp_path / "whole")
    code, out, _ = run(capsys, *common, "--output", tmp_path / "a")
    expected = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    import shutil

    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000004")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    code, out, _ = run(capsys, "train", "--output", tmp_path / "a", "--resume", "--micro-batch-tokens", 160)
    assert code == 0 and "after step 3 of 4" in out
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("arguments, expected", [
    (["report", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
    (["generate", "--model", "/nowhere", "--prompt", "x"], "/nowhere"),
    (["generate", "--model", "{model}", "--adapter", "/nowhere/c", "--prompt", "x"], "/nowhere/c"),
    (["generate", "--model", "{model}", "--prompt", "x", "--format", "chat"], "chat"),
    (["generate", "--model", "{model}", "--prompt", "x", "--temperature", "-1"], "temperature"),
    (["data", "/nowhere/d", "--model", "{model}"], "/nowhere/d"),
    (["merge", "--model", "{model}", "--adapter", "/nowhere/e", "--output", "out"], "/nowhere/e"),
    (["train", "--model", "{model}", "--data", "d", "--output", "o", "--use-dora"], "DoRA"),
    (["train", "--model", "{model}", "--data", "d", "--output", "o", "--modules-to-save", "lm_head"], "sum over tokens"),
    (["train", "--model", "{model}", "--data", "d", "--output", "o", "--init-lora-weights", "pissa"], "PiSSA"),
    (["train", "--model", "{model}", "--data", "d", "--output", "o", "--loraplus-lr-ratio", "0"], "loraplus_lr_ratio"),
    (["train", "--model", "{model}", "--data", "d", "--output", "o", "--lr-scheduler-kwargs", "{"], "not JSON"),
    (["generate", "--model", "{model}"], "--prompt TEXT or --chat"),
    (["generate", "--model", "{model}", "--prompt", "x", "--chat"], "--prompt TEXT or --chat"),
    (["generate", "--model", "{model}", "--chat", "--format", "text"], "a chat is made of messages"),
    (["bogus"], "bogus"),
])
def test_other_commands_bad_input_exits_2(arguments, expected, model, capsys):
    code, out, err = run(capsys, *(str(model) if a == "{model}" else a for a in arguments))
    assert code == 2
    assert expected in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_no_model_is_fetched_unless_its_name_asks_for_it(tmp_path, monkeypatch):
    from fastlora.errors import InputError
    from fastlora.setup import find_model

    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name", None) == ("owner/name", None, True)
    (tmp_path / "owner").mkdir()
    for name in ("owner/name", "name", "./name", "/owner/name", "../owner/name", "a/b/c"):
        with pytest.raises(InputError, match="no such folder"):
            find_model(name, None)


def test_interrupted_command_saves_says_how_to_go_on_and_exits_130(model, tmp_path):
    """A real Ctrl-C, on a process of its own."""
    import signal
    import time

    data = write_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-m", "fastlora", "train", "--model", str(model), "--data", str(data), "--output",
               str(tmp_path / "a"), "--steps", "100000", "--batch-size", "4", "--rank", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    log = tmp_path / "a" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert re.search("go on with: .*fastlora train --output", out) and "--resume" in out
    done = json.loads((tmp_path / "a" / "report.json").read_text())["steps"]
    assert done == log.read_text().count("\n") >= 2
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
