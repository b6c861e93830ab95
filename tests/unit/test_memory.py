"""Memory that runs out at any point of a step: repeated with smaller micro-batches, to the same bytes."""

from __future__ import annotations

import contextlib
import json
import types

import pytest
import torch
from tiny_run import DEVICES, model_on, train

import fastlora.setup as setup
from fastlora import memory, packing, selfcheck
from fastlora.errors import TrainingError
from fastlora.exact import lora_modules
from fastlora.setup import Objective
from fastlora.token_rows import make_row
from fastlora.train import Trainer


def adapter_of(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def course_of(folder) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "fingerprint")
    return [tuple(json.loads(line)[n] for n in names) for line in (folder / "log.jsonl").read_text().splitlines()]


def shortage():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")


class _Fails(torch.autograd.Function):
    """Passes its input on; its backward runs out of memory when ``when()`` says so."""

    @staticmethod
    def forward(ctx, x, when):
        ctx.when = when
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.when():
            shortage()
        return gradient, None


@contextlib.contextmanager
def planted(model, where: str, when, monkeypatch):
    """Plant a shortage that strikes when ``when()`` is true, which is asked once a micro-batch."""
    with monkeypatch.context() as patch:
        if where == "loss":
            original = setup.linear_cross_entropy

            def loss(*args, **more):
                if when():
                    shortage()
                return original(*args, **more)

            patch.setattr(setup, "linear_cross_entropy", loss)
            hook = contextlib.nullcontext()
        else:
            def forward(_module, _inputs, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if where == "forward" and when():
                    shortage()
                if where == "backward" and torch.is_grad_enabled():
                    hidden = _Fails.apply(hidden, when)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            # Behind the first of two layers: in its backward the second layer's sums stand already.
            hook = model.model.layers[0].register_forward_hook(forward)
        with hook:
            yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["forward", "backward", "loss"])
def test_out_of_memory_anywhere_gives_the_bytes_of_a_run_that_never_ran_out(tmp_path, where, device, monkeypatch):
    settings = {"steps": 3, "lora": {"lora_dropout": 0.1}, "batch_size": 6}
    train(tmp_path, "plain", model=model_on(device), **settings)
    model, at = model_on(device), {"step": 0, "attempts": [], "micro_batch": 0}
    partial, original = [], Trainer.sums

    def sums(self, rows, ids, cuts, step):
        at.update(step=step if hasattr(self, "progress") else 0, micro_batch=0)
        at["attempts"].append(at["step"])
        return original(self, rows, ids, cuts, step)

    def when() -> bool:
        at["micro_batch"] += 1
        # The second micro-batch of the first try of steps 1 and 3.
        due = at["step"] in (1, 3) and at["attempts"].count(at["step"]) == 1 and at["micro_batch"] == 2
        if due:
            partial.append(any(m.sums and bool(m.sums[1].total.any()) for _, m in lora_modules(model)))
        return due

    monkeypatch.setattr(Trainer, "sums", sums)
    with planted(model, where, when, monkeypatch):
        _, trainer, printed = train(tmp_path, "short", model=model, micro_batch_tokens=400, **settings)
    assert partial == [True, True]  # sums of an unfinished step were there to be dropped
    assert printed.count("out of memory at step") == 2
    assert "repeating it with micro-batches of at most" in printed and trainer.limit < 400
    assert adapter_of(tmp_path / "short") == adapter_of(tmp_path / "plain")
    assert course_of(tmp_path / "short") == course_of(tmp_path / "plain")
    reports = [json.loads((tmp_path / name / "report.json").read_text())["tensors"] for name in ("plain", "short")]
    assert reports[0] == reports[1]  # underflow counts too


def test_out_of_memory_in_an_evaluation_is_repeated_too(tmp_path, monkeypatch):
    from tiny_run import write_rows

    held = str(write_rows(tmp_path / "held.jsonl", 6, seed=9))
    plain, *_ = train(tmp_path, "plain", steps=1, eval_data=held)
    original, strikes = Objective.__call__, []

    def short(self, batch):
        if not torch.is_grad_enabled() and len(batch.lines) > 1 and not strikes:
            strikes.append(1)
            shortage()
        return original(self, batch)

    monkeypatch.setattr(Objective, "__call__", short)
    found, *_ = train(tmp_path, "short", steps=1, eval_data=held)
    assert strikes and found.held_out == plain.held_out
    assert adapter_of(tmp_path / "short") == adapter_of(tmp_path / "plain")


def test_out_of_memory_while_a_run_compares_two_cuts_of_its_first_batch(tmp_path, monkeypatch):
    _, trainer, _ = train(tmp_path, "a", steps=1)
    original, strikes = Objective.__call__, []

    def short(self, batch):
        if len(batch.lines) > 1 and not strikes:
            strikes.append(1)
            shortage()
        return original(self, batch)

    with contextlib.ExitStack() as stack:
        trainer.prepare(stack)
        del trainer.optimizer  # the comparison comes before it is made
        monkeypatch.setattr(Objective, "__call__", short)
        rows = trainer.batch_of(1)
        with trainer.one_thread():
            odd, _ = selfcheck.compare(trainer, rows, packing.sample_ids(rows))
    assert strikes and odd is None
    assert all(p.grad is None for p in trainer.model.parameters())


def rows(*lengths: int) -> list:
    return [make_row([3] * n, [True] * n, i, "text") for i, n in enumerate(lengths, start=1)]


def budget(config, row_list, device: str = "cpu"):
    said: list[str] = []
    made = memory.Budget(types.SimpleNamespace(micro_batch_tokens=config), torch.device(device), (row_list, ()), 16, said.append)
    return made, said


def test_auto_grows_to_what_the_measured_memory_holds_and_never_to_what_failed(monkeypatch):
    row_list = rows(*[64] * 100)
    made, said = budget("auto", row_list)
    made.limit = 512
    room = {"bytes": 10_000}
    # 2 bytes a token were measured: (peak - now) over the tokens of the largest micro-batch.
    monkeypatch.setattr(memory, "memory_of", lambda _: (1000 + 2 * made.limit, 1000, room["bytes"]))
    made.grow(row_list)
    assert made.limit == 1024  # at most double
    made.grow(row_list)
    assert made.limit == 2048
    made.grow(row_list)
    wanted = int(memory.SHARE * 10_000 / 2) // 16 * 16
    assert made.limit == min(4096, wanted)
    room["bytes"] = 10**9
    calls = []

    def work(cuts):
        calls.append(cuts)
        if len(calls) == 1:
            shortage()
        return "done"

    assert made.run(row_list, work, lambda: calls.append("cleared"), "at step 1") == "done"
    assert calls[1] == "cleared" and made.limit < wanted
    failed = made.failed
    for _ in range(6):
        made.grow(row_list)
    assert made.limit < failed and said[-1].startswith("micro-batches: at most")
    made.grow(row_list[:3])  # a batch that was not cut says nothing
    limit = made.limit
    made.auto = False
    made.failed = None
    made.grow(row_list)
    assert made.limit == limit


def test_memory_of_a_cpu_is_not_measured_so_nothing_grows():
    row_list = rows(*[64] * 100)
    made, said = budget("auto", row_list)
    before = made.limit
    made.grow(row_list)
    assert (made.limit, said) == (before, [])


def test_a_shortage_with_one_sequence_stops_and_other_errors_pass():
    row_list = rows(100, 20)
    made, _ = budget(128, row_list)
    with pytest.raises(TrainingError, match="one sequence at a time .line 1, 100 tokens"):
        made.run(row_list, lambda cuts: shortage(), lambda: None, "at step 1")

    def other(cuts):
        raise RuntimeError("another fault")

    with pytest.raises(RuntimeError, match="another fault"):
        made.run(row_list, other, lambda: None, "at step 1")
