"""Checkpoints: the same bytes back, damage recognised, another run refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora.checkpoint as checkpoint
from fastlora.config import LoraConfig
from fastlora.digest import digest
from fastlora.errors import InputError, TrainingError
from fastlora.inject import inject
from fastlora.optim import AdamW


def trained(seed=0, steps=2):
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(8, 6))
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]), seed=seed)
    optimizer = AdamW(model, lr=1e-2)
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()
    optimizer.step()


def test_restore_goes_on_with_the_same_bytes(tmp_path):
    model, optimizer = trained()
    checkpoint.write(tmp_path, checkpoint.take(2, model, optimizer, {"a": 1}, {"note": "x"}))
    advance(model, optimizer, 2)
    other, other_optimizer = trained(seed=5, steps=0)
    found = checkpoint.latest(tmp_path)
    checkpoint.restore(found, other, other_optimizer)
    with torch.no_grad():
        other.q_proj.weight.copy_(model.q_proj.weight)
        other.q_proj.bias.copy_(model.q_proj.bias)
    advance(other, other_optimizer, 2)
    assert digest(other) == digest(model)
    assert (found.step, found.identity, found.extra, found.notes) == (2, {"a": 1}, {"note": "x"}, ())


def test_checkpoints_taken_into_one_room_hold_their_own_step_until_the_next(tmp_path):
    model, optimizer = trained()
    room, found = checkpoint.Room(model), []
    for step in (2, 3):
        taken = checkpoint.take(step, model, optimizer, {}, {}, room)
        fresh = checkpoint.take(step, model, optimizer, {}, {})
        kept, alone = taken.adapter | taken.optimizer, fresh.adapter | fresh.optimizer
        assert kept.keys() == alone.keys() and all(torch.equal(kept[name], alone[name]) for name in alone)
        found.append([tensor.data_ptr() for tensor in kept.values()])
        checkpoint.write(tmp_path, taken)
        assert digest(checkpoint.latest(tmp_path).adapter) == digest(model)
        advance(model, optimizer, step)
    assert found[0] == found[1] and len(set(found[0])) == len(found[0])


def test_a_room_that_is_full_or_of_another_dtype_gives_memory_of_its_own():
    room = checkpoint.Room(trained()[0])
    tensors = {"a": torch.randn(40), "b": torch.randn(60), "c": torch.randn(4).double(), "d": torch.randn(6, 8).t()}
    copies = room.copied(tensors)
    assert all(torch.equal(copies[name], tensors[name]) and copies[name].is_contiguous() for name in tensors)
    assert copies["b"].untyped_storage().nbytes() == 240
    assert room.empty().copied({"a": tensors["a"]})["a"].data_ptr() == copies["a"].data_ptr()


@pytest.mark.parametrize("together", [1, 50, 10**6])
def test_neighbours_travel_to_the_room_together_and_arrive_as_they_were(monkeypatch, together):
    monkeypatch.setattr(checkpoint, "TOGETHER", together)
    room = checkpoint.Room(trained()[0])
    tensors = {str(n): torch.randn(n) for n in range(1, 12)} | {"none": torch.empty(0), "double": torch.ones(3).double()}
    copies = room.copied(tensors)
    assert copies.keys() == tensors.keys() and all(torch.equal(copies[name], tensors[name]) for name in tensors)


def test_save_keeps_the_newest(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, checkpoint.take(step, model, optimizer, {}, {}), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_latest_passes_over_a_truncated_checkpoint(tmp_path, name):
    model, optimizer = trained()
    for step in (1, 2):
        checkpoint.write(tmp_path, checkpoint.take(step, model, optimizer, {}, {}))
    damaged = tmp_path / "step-00000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-7])
    found = checkpoint.latest(tmp_path)
    assert found.step == 1
    assert "step-00000002" in found.notes[0]
    damaged = tmp_path / "step-00000001" / name
    damaged.unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.latest(tmp_path)


def test_latest_of_an_empty_folder_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


def test_check_identity_names_the_first_difference():
    checkpoint.check_identity({"a": 1, "b": 2}, {"a": 1, "b": 2})
    with pytest.raises(InputError, match="seed was 0, now it is 1"):
        checkpoint.check_identity({"a": 1, "seed": 0}, {"a": 1, "seed": 1})
    with pytest.raises(InputError, match="extra was 3"):
        checkpoint.check_identity({"extra": 3}, {})


def test_save_leaves_the_old_one_whole_when_writing_fails(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.write(tmp_path, checkpoint.take(1, model, optimizer, {}, {}))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        checkpoint.write(tmp_path, checkpoint.take(2, model, optimizer, {}, {}))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path).step == 1


def test_no_pickle_in_a_checkpoint(tmp_path):
    model, optimizer = trained()
    folder = checkpoint.write(tmp_path, checkpoint.take(1, model, optimizer, {}, {}))
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter.safetensors", "optimizer.safetensors", "state.json"]
