"""A replayed step has the log's fingerprint under any cut; what differs is named; nothing is written."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from tiny_run import run_command as run
from tiny_run import save_model, write_rows

from fastlora import cli
from fastlora.checkpoint import newest
from fastlora.errors import InputError
from fastlora.replay import replay


def files(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with model, rows and a run of five steps that keeps the checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("replay")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in (
            "train", "--model", folder / "model", "--data", folder / "rows.jsonl", "--output", folder / "run", "--steps", 5,
            "--batch-size", 5, "--rank", 3, "--lora-dropout", 0.1, "--learning-rate", 1e-2, "--checkpoint-every", 2,
            "--keep-checkpoints", 3, "--activation-checkpointing", 1,
        )])  # fmt: skip
    assert not left.value.code
    assert sorted(p.name[-1] for p in (folder / "run" / "checkpoints").iterdir()) == ["2", "4", "5"]
    return folder


def quiet(folder, step, **more):
    return replay(folder, step, console=Console(file=io.StringIO()), **more)


def log_line(folder, step) -> dict:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[step - 1])


@pytest.mark.parametrize("step, cut, start", [(4, 192, 2), (2, 4096, 0)])
def test_replay_is_equal_under_another_cut_and_writes_nothing(done, capsys, step, cut, start):
    before = files(done)
    code, out, _ = run(capsys, "replay", done / "run", "--step", step, "--micro-batch-tokens", cut, "--count", 3)
    assert code == 0
    assert out.splitlines()[-1] == f"equal: steps {start + 1} to {step} have the fingerprints of the log"
    assert files(done) == before
    named = [line.split() for line in out.splitlines() if line.startswith("  line ")]
    assert len(named) == 3
    norms = [float(words[6]) for words in named]
    assert norms == sorted(norms, reverse=True) and norms[-1] > 0
    logged = {(str(n), i) for m in log_line(done / "run", step)["micro_batches"] for n, i in zip(m["lines"], m["sample_ids"])}
    assert {(words[1], words[3]) for words in named} <= logged


def test_replay_gives_each_sequence_its_share_of_the_step(done):
    found, line = quiet(done / "run", 3), log_line(done / "run", 3)
    assert found.equal and found.start == 2 and len(found.sequences) == 2
    supervised = sum(s.supervised for s in found.sequences)
    assert supervised == line["supervised_tokens"]
    # The same losses added in one order: the log's bits, once divided. Norms obey the triangle's rule.
    mean = sum(s.loss * s.supervised for s in found.sequences) / supervised
    assert abs(mean - line["loss"]) <= 2.0**-50 * line["loss"]
    norms = [s.gradient_norm for s in found.sequences]
    assert norms[0] - norms[1] <= line["grad_norm"] * (1 + 2.0**-20)
    assert line["grad_norm"] <= sum(norms) * (1 + 2.0**-20)


def test_replay_names_the_step_and_the_tensor_that_differ(done, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from fastlora import checkpoint

    folder = shutil.copytree(done / "run", tmp_path / "run")
    place = folder / "checkpoints" / "step-00000002"
    tensors = load_file(place / "adapter.safetensors")
    name = sorted(tensors)[5]
    tensors[name].view(torch.int32)[0, 0] ^= 1 << 20
    save_file(tensors, place / "adapter.safetensors", metadata={"format": "pt"})
    state = json.loads((place / "state.json").read_text())
    state["files"]["adapter.safetensors"] = checkpoint._md5(place / "adapter.safetensors")
    (place / "state.json").write_text(json.dumps(state))
    code, out, _ = run(capsys, "replay", folder, "--step", 3)
    assert code == 1
    verdict = out.splitlines()[-1]
    assert verdict.startswith("different: after step 3: first model.layers.0.")
    found = quiet(folder, 4)
    assert found.different_step == 3 and name.removeprefix("base_model.model.") in found.tensors
    assert found.tensors[0].startswith("model.layers.0.") and len(found.sequences) == 5


def test_replay_of_a_log_without_codes_says_so(done, tmp_path):
    folder = shutil.copytree(done / "run", tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["codes"]
    lines[2]["fingerprint"] = "0" * 32
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = quiet(folder, 3)
    assert found.verdict() == "different: after step 3: the log does not tell which tensor"


def test_replay_passes_over_a_damaged_checkpoint_and_says_so(done, tmp_path):
    folder = shutil.copytree(done / "run", tmp_path / "run")
    (folder / "checkpoints" / "step-00000002" / "optimizer.safetensors").write_bytes(b"cut")
    found = quiet(folder, 3)
    assert found.equal and found.start == 0 and "step-00000002 is damaged" in found.notes[0]
    assert newest(folder / "checkpoints", 3)[0] is None


def test_replay_takes_a_model_object_and_moved_data(done, tmp_path):
    from fastlora.setup import choose_device, choose_dtype, load_model, load_tokenizer

    device, _ = choose_device("auto")  # as the run's command did
    folder = shutil.copytree(done / "run", tmp_path / "run")
    data = shutil.copy(done / "rows.jsonl", tmp_path / "moved.jsonl")
    text = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text("\n".join(n for n in text.splitlines() if not n.startswith(("model = \"/", "data = \"/"))))
    with pytest.raises(InputError, match="model: the run got its model as an object"):
        quiet(folder, 1)
    place = str(done / "model")
    model = load_model(place, dtype=choose_dtype("auto", device), device=device)
    found = quiet(folder, 1, model=model, tokenizer=load_tokenizer(place), data=data)
    assert found.equal


def bad(done, tmp_path, case):
    """(arguments after ``replay``, what the message holds)."""
    folder, moved = done / "run", []
    if case == "another model":
        moved = ["--model", save_model(tmp_path / "other", seed=1)]
    elif case == "other data":
        moved = ["--data", write_rows(tmp_path / "other.jsonl", seed=1)]
    elif case == "no run":
        folder = tmp_path
    elif case == "no log":
        folder = shutil.copytree(folder, tmp_path / "run")
        (folder / "log.jsonl").unlink()
    elif case == "another setting":
        folder = shutil.copytree(folder, tmp_path / "run")
        text = (folder / "run.toml").read_text()
        (folder / "run.toml").write_text(text.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    elif case == "small cut":
        moved = ["--micro-batch-tokens", 16]
    return [folder, "--step", {"step 0": 0, "step 6": 6}.get(case, 2), *moved]


@pytest.mark.parametrize("case, expected", [
    ("no run", "no run to replay there"), ("step 0", "step = 0: allowed is 1 to 5"), ("step 6", "step = 6: allowed is 1 to 5"),
    ("no log", "holds no step yet"), ("another model", "another run than the one stored: model was"),
    ("other data", "another run than the one stored: data was"), ("another setting", "learning_rate was 0.01, now it is 0.02"),
    ("small cut", "micro_batch_tokens = 16: line"),
])
def test_replay_bad_input_exits_2_with_one_line(done, tmp_path, capsys, case, expected):
    before = files(done)
    arguments = bad(done, tmp_path, case)
    code, _, err = run(capsys, "replay", *arguments)
    assert code == 2 and expected in err.strip().splitlines()[-1], err
    assert "Traceback" not in err and files(done) == before
