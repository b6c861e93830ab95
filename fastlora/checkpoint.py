"""Checkpoints: adapter, optimiser and position, without pickle, each whole or not at all.

A checkpoint is a folder ``checkpoints/step-00000010`` with ``adapter.safetensors``,
``optimizer.safetensors`` and ``state.json``. It is written under another name and renamed; its
``state.json`` holds the MD5 of the other two, so that one cut short is recognised and passed over.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.adapter import adapter_state
from fastlora.digest import adapter_tensors
from fastlora.errors import InputError, TrainingError

STATE_FILE = "state.json"
TENSOR_FILES = ("adapter.safetensors", "optimizer.safetensors")
# Elements of neighbouring tensors that go to the host in one copy: 64 MB of a GPU's memory meanwhile.
TOGETHER = 2**24
LAYOUT = 1  # goes up when an older reader could no longer read the folder


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint that was read.

    Attributes:
        step: optimiser steps done. ``path``: its folder.
        identity: what the run was made of, by name; must be the same to go on.
        extra: what the trainer keeps beside (held-out losses, versions).
        adapter: fp32 tensors by the adapter file's names.
        optimizer: ``state_dict`` of the optimiser.
        notes: a sentence for every newer checkpoint that was damaged.
    """

    step: int
    path: pathlib.Path
    identity: dict
    extra: dict
    adapter: dict[str, torch.Tensor]
    optimizer: dict
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a checkpoint of ``step`` will hold, on the host: what the model does next changes nothing in it."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict


class Room:
    """Host memory that a run's checkpoints are copied into, one after the other: half a gigabyte for an 8B model at rank 16.

    It is asked for once, and locked where there is a GPU: a copy into memory that is new waits for each of its pages (H200: 430 ms a
    checkpoint of that size, against 10 ms), and the GPU with it.

    Args:
        model: three times its adapter (with AdamW's two moments) is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = list(adapter_tensors(model).values())
        self._kept = _host_memory(3 * sum(t.numel() for t in tensors), locked=tensors[0].is_cuda)
        self._used = 0

    def empty(self) -> Room:
        """The same room for the next checkpoint; what the last one held is gone."""
        self._used = 0
        return self

    def copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of ``tensors`` [any shape, dtype] by name: in the room, or beside it where one is not fp32 or there is no place left.
        Neighbours travel together: a copy of each by itself would cost more than its bytes."""
        copies, together, at = {}, [], self._used
        for name, tensor in tensors.items():
            tensor, end = tensor.detach(), self._used + tensor.numel()
            if tensor.dtype != self._kept.dtype or end > self._kept.numel():
                copies[name] = tensor.to("cpu", copy=True).contiguous()
                continue
            if together and (end - at > TOGETHER or tensor.device != together[0].device):
                self._fill(at, together)
                together, at = [], self._used
            copies[name] = self._kept[self._used : end].view(tensor.shape)
            together.append(tensor)
            self._used = end
        if together:
            self._fill(at, together)
        return copies

    def _fill(self, at: int, tensors: list[torch.Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._kept[at : at + flat.numel()].copy_(flat)


def _host_memory(elements: int, locked: bool) -> torch.Tensor:
    """fp32 [elements], not initialised; page-locked if that is asked for and the system allows so much."""
    if locked:
        with contextlib.suppress(RuntimeError):
            return torch.empty(elements, pin_memory=True)
    return torch.empty(elements)


def take(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict, extra: dict, room: Room | None = None) -> Taken:
    """Copy adapter, optimiser and position to the host: into ``room``, which what was taken before must not need any more."""
    room = Room(model) if room is None else room.empty()
    adapter = room.copied(adapter_state(model))
    tensors, scalars = _split(optimizer.state_dict())
    state = {"layout": LAYOUT, "step": step, "identity": identity, "extra": extra, "optimizer": scalars}
    return Taken(step, adapter, room.copied(tensors), copy.deepcopy(state))


def write(folder: str | os.PathLike, taken: Taken, keep: int = 2, best: int | None = None) -> pathlib.Path:
    """Write a checkpoint below ``folder`` and remove all but the newest ``keep`` and that of step ``best``.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints stay whole.
    """
    folder = pathlib.Path(folder)
    final = folder / _name(taken.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = taken.state | {"files": {}}
        for name, content in zip(TENSOR_FILES, (taken.adapter, taken.optimizer)):
            save_file(content, temporary / name, metadata={"format": "pt"})
            state["files"][name] = _md5(temporary / name)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name in (*TENSOR_FILES, STATE_FILE):
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(f"{final}: the checkpoint could not be written ({error}); "
                            "earlier ones are whole") from error
    for old in _folders(folder)[keep:]:
        if best is None or old.name != _name(best):
            _remove(old)
    return final


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _remove(folder: pathlib.Path) -> None:
    """Take a checkpoint away under another name first: half of one must never look like one that was damaged."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def latest(folder: str | os.PathLike) -> Checkpoint | None:
    """The newest whole checkpoint below ``folder``; a damaged one is passed over and named in ``notes``.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    found, notes = newest(folder)
    if found is None and notes:
        raise InputError(f"resume: no whole checkpoint in {os.fspath(folder)}: {'; '.join(notes)}; "
                         "start again with --overwrite")
    return found


def newest(folder: str | os.PathLike, at_most: int | None = None) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest whole checkpoint of at most ``at_most`` steps, or None; and what was damaged, a sentence each."""
    notes: list[str] = []
    for path in _folders(pathlib.Path(folder)):
        step = path.name.partition("-")[2]
        if at_most is not None and step.isdecimal() and int(step) > at_most:
            continue
        try:
            return dataclasses.replace(_read(path), notes=tuple(notes)), tuple(notes)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            notes.append(f"checkpoint {path.name} is damaged ({error}); the one before it is used")
    return None, tuple(notes)


def check_identity(found: dict, wanted: dict) -> None:
    """Refuse a checkpoint of another model, data or configuration.

    Raises:
        InputError: names the first entry that differs, with both values.
    """
    difference = first_difference(found, wanted)
    if difference:
        raise InputError(f"resume: the checkpoint is of another run: {difference}; "
                         "give the same, or start again with --overwrite")


def first_difference(found: dict, wanted: dict) -> str | None:
    """The first entry in which two identities differ, with both values, or None."""
    for name in (*wanted, *(n for n in found if n not in wanted)):
        was, now = found.get(name), wanted.get(name)
        if was != now:
            return f"{name} was {was!r}, now it is {now!r}"
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the adapter and the optimiser's state back, byte for byte.

    Raises:
        InputError: other tensors or shapes than the model's.
    """
    mine = adapter_tensors(model)
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in checkpoint.adapter.items()}:
        odd = sorted(set(mine) ^ set(checkpoint.adapter)) or ["a shape differs"]
        raise InputError(f"resume: {checkpoint.path} holds another adapter ({', '.join(odd[:3])})")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(checkpoint.adapter[name])
    optimizer.load_state_dict(checkpoint.optimizer)


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _read(path: pathlib.Path) -> Checkpoint:
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if state["layout"] != LAYOUT:
        raise ValueError(f"layout {state['layout']}, this version reads {LAYOUT}")
    for name, expected in state["files"].items():
        if _md5(path / name) != expected:
            raise ValueError(f"{name} does not have the MD5 it was written with")
    adapter, tensors = (load_file(path / name) for name in TENSOR_FILES)
    return Checkpoint(state["step"], path, state["identity"], state["extra"], adapter,
                      _join(tensors, state["optimizer"]))


def _split(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimiser's state_dict as named tensors and what JSON can hold."""
    tensors, numbers = {}, {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def _join(tensors: dict[str, torch.Tensor], scalars: dict) -> dict:
    state: dict[int, dict] = {int(index): dict(entry) for index, entry in scalars["numbers"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in scalars["param_groups"]]
    return {"state": state, "param_groups": groups}


def _md5(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
