"""The trainer: log, schedule, memory, stops, resume, and what it refuses."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from tiny_run import tiny_model, train, write_rows

from fastlora import rundir
from fastlora.errors import InputError, TrainingError
from fastlora.train import Trainer


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def adapter_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_train_logs_what_ran(tmp_path):
    result, trainer, printed = train(tmp_path, "a", micro_batch_tokens=192, batch_size=5, steps=4)
    lines = log_of(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # 12 rows in batches of 5, 5, 2, then the next epoch.
    assert [sum(len(m["sample_ids"]) for m in line["micro_batches"]) for line in lines] == [5, 5, 2, 5]
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2]
    seen = sorted(n for line in lines[:3] for m in line["micro_batches"] for n in m["lines"])
    assert seen == list(range(1, 13))
    for line in lines:
        assert all(m["padded_tokens"] <= 192 and m["tokens"] <= m["padded_tokens"] for m in line["micro_batches"])
        assert line["tokens"] == sum(m["tokens"] for m in line["micro_batches"])
        assert len(line["fingerprint"]) == 32
        assert line["learning_rate"] > 0 and line["grad_norm"] > 0
    assert len({line["fingerprint"] for line in lines}) == 4
    assert lines[-1]["digest"] == result.digest == result.report["digest"]["after"]
    assert "batch: 5 sequences per optimiser step" in printed
    assert "reference" in printed and "device: CPU" in printed and "exact under splitting" in printed


def test_train_leaves_every_file_and_the_model_as_it_was(tmp_path):
    model = tiny_model()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    attention = model.config._attn_implementation
    train(tmp_path, "a", model=model, eval_data=str(write_rows(tmp_path / "held.jsonl", 4, seed=9)))
    for name in (*rundir.ADAPTER_FILES, rundir.REPORT, rundir.LOG, rundir.PICTURE, rundir.RUN):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    assert model.config._attn_implementation == attention
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["frozen_fingerprint"]["before"] == report["frozen_fingerprint"]["after"]
    assert report["held_out"]["rows"] == 4
    assert [point[0] for point in report["held_out"]["course"]] == [0, 1, 2, 3]
    stored = rundir.read_run(tmp_path / "a")
    assert stored["train"]["learning_rate"] == 1e-2
    assert stored["data"]["format"] == "prompt-completion"
    assert stored["lora"]["r"] == 4


@pytest.mark.parametrize("stop_at, cut", [(2, 4096), (3, 160)])
def test_resume_with_another_cut_gives_the_same_bytes(tmp_path, stop_at, cut):
    held = str(write_rows(tmp_path / "held.jsonl", 3, seed=9))
    settings = {"steps": 5, "checkpoint_every": 1, "lora": {"lora_dropout": 0.1}, "eval_data": held}
    whole, *_ = train(tmp_path, "whole", **settings)
    stopped, trainer, printed = stop_after(tmp_path, "stopped", stop_at, **settings)
    (tmp_path / "stopped" / ".report.json.1x.tmp").write_text("half")
    (tmp_path / "stopped" / ".mine.tmp").write_text("kept")
    (tmp_path / "stopped" / "checkpoints" / ".step-00000009.tmp").mkdir()
    assert stopped.steps == stop_at and stopped.signal == signal.SIGINT
    assert "--resume" in printed and "fastlora train --output" in printed
    resumed, *_ = train(tmp_path, "stopped", resume=True, micro_batch_tokens=cut, **settings)
    assert adapter_of(tmp_path / "stopped") == adapter_of(tmp_path / "whole")
    names = ("step", "loss", "fingerprint", "learning_rate", "grad_norm")
    logs = [[{n: line[n] for n in names} for line in log_of(tmp_path / d)] for d in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [p.name for p in (tmp_path / "stopped").rglob(".*")] == [".mine.tmp"]
    assert resumed.held_out == whole.held_out


def stop_after(folder, name, step, **settings):
    """A run that gets Ctrl-C in the middle of ``step``."""
    original = Trainer.sums

    def sums(self, rows, ids, cuts, number):
        if number == step and hasattr(self, "progress"):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, rows, ids, cuts, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "sums", sums)
        return train(folder, name, **settings)


def test_resume_passes_over_a_damaged_checkpoint(tmp_path):
    settings = {"steps": 4, "checkpoint_every": 1}
    train(tmp_path, "whole", **settings)
    stop_after(tmp_path, "a", 3, **settings)
    newest = tmp_path / "a" / "checkpoints" / "step-00000003" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    _, _, printed = train(tmp_path, "a", resume=True, **settings)
    assert "step-00000003 is damaged" in printed and "after step 2 of 4" in printed
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "whole")


@pytest.mark.parametrize("change, name", [
    ({"learning_rate": 1e-3}, "learning_rate"), ({"steps": 9}, "steps"), ({"seed": 1}, "seed"),
    ({"lora": {"lora_dropout": 0.5}}, "lora"), ({"label_smoothing": 0.1}, "label_smoothing"), ({"z_loss": 1e-4}, "z_loss"),
])
def test_resume_refuses_another_run_by_its_first_difference(tmp_path, change, name):
    train(tmp_path, "a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"another run: {name} was"):
        train(tmp_path, "a", resume=True, **change)
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}


def test_resume_refuses_other_data_and_another_model(tmp_path):
    train(tmp_path, "a")
    with pytest.raises(InputError, match="another run: data was"):
        train(tmp_path, "a", resume=True, data=write_rows(tmp_path / "other.jsonl", seed=3))
    with pytest.raises(InputError, match="another run: model was"):
        train(tmp_path, "a", resume=True, model=tiny_model(seed=1))


def test_output_with_another_run_is_refused_unless_said(tmp_path):
    first, *_ = train(tmp_path, "a")
    with pytest.raises(InputError, match="holds another run"):
        train(tmp_path, "a")
    (tmp_path / "a" / "mine.txt").write_text("kept")
    second, *_ = train(tmp_path, "a", overwrite=True, seed=1)
    assert first.digest != second.digest
    assert (tmp_path / "a" / "mine.txt").read_text() == "kept"
    with pytest.raises(InputError, match="no run to go on with"):
        train(tmp_path, "absent", resume=True)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_repeats_the_step_with_the_same_bytes(tmp_path, where, monkeypatch):
    train(tmp_path, "plain")
    from fastlora.setup import BatchLoss, Objective

    original, calls = Objective.__call__, []

    def short_of_memory(self, batch):
        calls.append(batch.stream.total)
        # The probe before step 1 has one row; the second forward of a later, larger batch fails.
        if batch.stream.total > 250:
            if where == "forward":
                raise torch.OutOfMemoryError("out of memory (planted)")
            loss = original(self, batch)

            def fail(_):
                raise torch.OutOfMemoryError("out of memory (planted)")

            loss.total.register_hook(fail)
            return BatchLoss(loss.total, loss.documents, loss.supervised)
        return original(self, batch)

    monkeypatch.setattr(Objective, "__call__", short_of_memory)
    _, trainer, printed = train(tmp_path, "short", micro_batch_tokens=400)
    assert adapter_of(tmp_path / "short") == adapter_of(tmp_path / "plain")
    assert "out of memory at step 1: repeating it" in printed
    assert trainer.limit <= 250 < max(calls)


def test_out_of_memory_with_one_sequence_stops(tmp_path, monkeypatch):
    from fastlora.setup import Objective

    original = Objective.__call__

    def none_left(self, batch):
        if len(batch.lines) > 1 or batch.lines[0] == 11:
            raise torch.OutOfMemoryError("out of memory (planted)")
        return original(self, batch)

    monkeypatch.setattr(Objective, "__call__", none_left)
    with pytest.raises(TrainingError, match="one sequence at a time .line 11"):
        train(tmp_path, "a", shuffle=False)


def test_micro_batch_tokens_below_a_row_is_refused(tmp_path):
    with pytest.raises(InputError, match="micro_batch_tokens = 100: line 11"):
        train(tmp_path, "a", micro_batch_tokens=100)
    assert not (tmp_path / "a").exists()


def test_nan_in_a_weight_is_named_before_the_first_step(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: the loss of line \d+ is nan; "
                                            r"module model.layers.1.mlp.up_proj: its weight is not finite"):
        train(tmp_path, "a", model=model)
    assert not (tmp_path / "a").exists()


def test_nan_while_running_names_step_and_keeps_the_last_good_adapter(tmp_path, monkeypatch):
    good, *_ = train(tmp_path, "good", steps=4)
    original = Trainer._advance

    def poisoned(self):
        if self.done == 2:
            with torch.no_grad():
                self.model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
        original(self)

    monkeypatch.setattr(Trainer, "_advance", poisoned)
    with pytest.raises(TrainingError, match=r"step 3: the loss of line \d+.*layers.0.self_attn.q_proj"):
        train(tmp_path, "a", steps=4)
    assert [line["step"] for line in log_of(tmp_path / "a")] == [1, 2]
    assert (tmp_path / "a" / "checkpoints" / "step-00000002").is_dir()
    from fastlora.checkpoint import latest
    from fastlora.digest import digest

    kept = latest(tmp_path / "a" / "checkpoints")
    assert kept.step == 2
    assert digest(kept.adapter) != good.digest
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_nan_in_a_gradient_names_the_line(tmp_path, monkeypatch):
    from fastlora.setup import BatchLoss, Objective

    original = Objective.__call__

    def poisoned(self, batch):
        loss = original(self, batch)
        if 7 not in batch.lines or not torch.is_grad_enabled() or self.calls < 2:
            self.calls = getattr(self, "calls", 0) + 1
            return loss
        loss.total.register_hook(lambda g: g * float("nan"))
        return BatchLoss(loss.total * 1.0, loss.documents, loss.supervised)

    Objective.calls = 0
    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(TrainingError, match=r"step 2: line 7: .*NaN.*no parameter was changed"):
        train(tmp_path, "a", shuffle=False, batch_size=6)
    del Objective.calls
    assert [line["step"] for line in log_of(tmp_path / "a")] == [1]


def test_full_disk_keeps_the_old_files_whole(tmp_path, monkeypatch):
    from fastlora import checkpoint

    original, calls = checkpoint.save_file, []

    def full(*args, **more):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return original(*args, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        train(tmp_path, "a", checkpoint_every=1, steps=3)
    assert checkpoint.latest(tmp_path / "a" / "checkpoints").step == 1
    from safetensors.torch import load_file

    assert load_file(tmp_path / "a" / "adapter_model.safetensors")


def test_trainer_takes_an_injected_model_and_refuses_a_second_configuration(tmp_path):
    from fastlora.config import LoraConfig
    from fastlora.inject import inject

    with pytest.raises(InputError, match="adapters already"):
        train(tmp_path, "a", model=inject(tiny_model(), LoraConfig(r=2)))
