"""``fastlora replay``: compute a step of a run again, with any cut, and compare it with the log. Reads the run, writes nothing.

A loss that jumped, a machine under suspicion, a run of someone else: the nearest checkpoint at or before the step is put
back, the trainer's own loop computes the steps up to it, and each fingerprint must be that of the log. The step's sequences
are then named by the size of their gradients, each computed alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib

import torch
from torch import nn

from fastlora import checkpoint, guards, packing, rundir
from fastlora.config import LoraConfig
from fastlora.digest import PREFIX, adapter_tensors
from fastlora.errors import InputError
from fastlora.exact import check_all, discard, lora_modules
from fastlora.inject import injection
from fastlora.log import RunLog
from fastlora.setup import load
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class SequenceOfStep:
    """One sequence of the replayed step, at the parameters before that step.

    Attributes:
        line: its line in the data file. sample_id: its name in the log, 16 hex characters.
        gradient_norm: L2 norm of its share of the step's gradient (its own sum over the whole batch's supervised tokens,
            before clipping).
        loss: nats per supervised token. supervised: how many those are.
    """

    line: int
    sample_id: str
    gradient_norm: float
    loss: float
    supervised: int


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay came to.

    Attributes:
        step: the step asked for. start: steps that the restored checkpoint had done; 0: the run's beginning.
        different_step: the first step whose fingerprint is not the log's, or None.
        tensors: the adapter tensors that differ there, in the model's order; empty if the log cannot tell.
        sequences: all of the step, largest gradient first.
        notes: a sentence for each damaged checkpoint and for other versions than the run's.
    """

    step: int
    start: int
    different_step: int | None
    tensors: tuple[str, ...]
    sequences: tuple[SequenceOfStep, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every recomputed step has the log's fingerprint."""
        return self.different_step is None

    def verdict(self) -> str:
        """One line that begins with ``equal`` or ``different``."""
        if self.equal:
            return f"equal: steps {self.start + 1} to {self.step} have the fingerprints of the log"
        which = "the log does not tell which tensor" if not self.tensors else f"first {self.tensors[0]}"
        more = f" (and {len(self.tensors) - 1} more)" if len(self.tensors) > 1 else ""
        return f"different: after step {self.different_step}: {which}{more}"


def replay(
    run: str | os.PathLike, step: int, *, micro_batch_tokens: int | str | None = None, model: str | nn.Module | None = None,
    tokenizer=None, data: str | os.PathLike | None = None, console=None,
) -> Replay:
    """Compute steps up to ``step`` of a run again and compare each with the log.

    Args:
        run: the run's folder. step: counted from 1. micro_batch_tokens: another cut; None: the run's own setting.
        model: where the base model is now if it moved, or the model itself (then with its ``tokenizer``).
        data: where the data file is now if it moved. console: as for :class:`fastlora.Trainer`.

    Raises:
        InputError: no run in ``run``, a step that the log does not hold, or another model, data or device than the run's,
            which names the first difference.
        TrainingError: a step could not be computed (a loss that is not finite, no memory for one sequence).
    """
    folder = pathlib.Path(run)
    if not (folder / rundir.RUN).is_file():
        raise InputError(f"run = {os.fspath(run)!r}: no run to replay there (no {rundir.RUN})")
    stored = rundir.read_run(folder)
    records = _records(folder, step)
    config = _config(stored, folder, micro_batch_tokens, model, data)
    lora = LoraConfig.from_peft(stored.get("lora", {}), rundir.RUN)
    if not isinstance(model, nn.Module):
        model, tokenizer = load(config)
    trainer = Trainer(model, tokenizer, config, lora if injection(model) is None else None, console=console)
    with contextlib.ExitStack() as stack:
        trainer.prepare(stack)
        found, damaged = checkpoint.newest(folder / rundir.CHECKPOINTS, step - 1)
        _check_same(trainer, stored, found or checkpoint.newest(folder / rundir.CHECKPOINTS)[0])
        if found:
            checkpoint.restore(found, trainer.model, trainer.optimizer)
            trainer.done = found.step
        return _steps(trainer, records, step, (*damaged, *_other_versions(stored)))


def _records(folder: pathlib.Path, step: int) -> dict[int, dict]:
    """Log lines by step, ``step`` among them."""
    path = folder / rundir.LOG
    records = {r["step"]: r for r in RunLog(path).read() if isinstance(r, dict) and {"step", "fingerprint"} <= r.keys()}
    if step not in records:
        allowed = f"allowed is 1 to {max(records)}, the steps of its log" if records else f"{path} holds no step yet"
        raise InputError(f"step = {step!r}: {allowed}")
    return records


def _config(stored: dict, folder: pathlib.Path, micro_batch_tokens, model, data) -> TrainConfig:
    """The run's settings, with what the caller gives in their place. Held-out data is not read."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {k: v for k, v in stored.get("train", {}).items() if k in known}
    settings |= {"output": str(folder), "eval_data": None, "resume": False, "overwrite": False}
    if data is not None:
        settings["data"] = str(data)
    if model is not None:
        settings["model"] = None if isinstance(model, nn.Module) else model
    elif not settings.get("model"):
        raise InputError("model: the run got its model as an object; give the folder it can be read from")
    if micro_batch_tokens is not None:
        settings["micro_batch_tokens"] = micro_batch_tokens
    if "data" not in settings:
        raise InputError(f"run = {str(folder)!r}: its {rundir.RUN} names no data")
    return TrainConfig(**settings)


def _check_same(trainer: Trainer, stored: dict, found: checkpoint.Checkpoint | None) -> None:
    """Refuse another model, data, device or configuration, by run.toml and by a checkpoint where there is one."""
    difference = None
    if "made_of" in stored:
        difference = checkpoint.first_difference(stored["made_of"], rundir.made_of(trainer.identity))
    if difference is None and found is not None:
        difference = checkpoint.first_difference(found.identity, trainer.identity)
    if difference is not None:
        raise InputError(f"replay: this is another run than the one stored: {difference}")


def _other_versions(stored: dict) -> list[str]:
    changed = rundir.changed_versions(stored.get("versions", {}))
    return [changed] if changed else []


def _steps(trainer: Trainer, records: dict[int, dict], step: int, notes: tuple[str, ...]) -> Replay:
    start, different, tensors, sequences = trainer.done, None, (), ()
    while trainer.done < step:
        if trainer.done == step - 1:
            sequences = _sequences(trainer, step)
        trainer.compute()
        record = records.get(trainer.done)
        if different is None and record is not None:
            whole, codes = trainer.fingerprint.and_codes()
            if whole != record["fingerprint"]:
                different, tensors = trainer.done, _odd(trainer.model, record.get("codes"), codes)
    return Replay(step, start, different, tensors, sequences, notes)


def _odd(model: nn.Module, logged: str | None, ours: str) -> tuple[str, ...]:
    """Names of the adapter tensors whose codes differ, in the model's order."""
    names = list(adapter_tensors(model))
    if logged is None or len(logged) != len(ours):
        return ()
    odd = {n for i, n in enumerate(sorted(names)) if logged[4 * i : 4 * i + 4] != ours[4 * i : 4 * i + 4]}
    return tuple(n.removeprefix(PREFIX) for n in names if n in odd)


def _sequences(trainer: Trainer, step: int) -> tuple[SequenceOfStep, ...]:
    """The sequences of ``step``, each run alone at the present parameters; its sums are read and dropped."""
    rows = trainer.batch_of(step)
    ids = packing.sample_ids(rows)
    divisor = packing.supervised_weight(rows) * trainer.config.gradient_scale
    found = []
    with trainer.one_thread():
        for index, row in enumerate(rows):
            ran = trainer.sums(rows, ids, [[index]], step)
            try:
                (loss,) = guards.losses_of(trainer.objective, ran, step)
                norm = _gradient_norm(trainer.model, divisor)
            finally:
                discard(trainer.model)
            loss /= packing.supervised_weight([row])
            found.append(SequenceOfStep(row.line, f"{ids[index]:016x}", norm, loss, row.supervised))
    return tuple(sorted(found, key=lambda s: (-s.gradient_norm, s.line)))


def _gradient_norm(model: nn.Module, divisor: float) -> float:
    sums = [(name, s) for name, m in lora_modules(model) for s in m.sums]
    check_all(sums)
    squares = torch.stack([s.gradient(divisor).double().square().sum() for _, s in sums])
    return math.sqrt(math.fsum(squares.tolist()))
