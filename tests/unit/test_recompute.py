"""Activation checkpointing: other memory, the same bytes; what cannot be had is refused by name."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tiny_run import tiny_model, train

from fastlora import TrainConfig, exact, inject, rundir
from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.exact import discard
from fastlora.invariant import Invariant, make_invariant
from fastlora.recompute import recompute_layers


def md5(folder) -> str:
    return hashlib.md5((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def count_forwards(model) -> list:
    """Grows by one for every run of the first layer's feed-forward part."""
    ran: list = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


def test_activation_checkpointing_gives_the_same_file_and_runs_layers_again(tmp_path):
    forwards = {}
    for every in (0, 1):
        model = tiny_model()
        ran = count_forwards(model)
        _, _, printed = train(tmp_path, f"a{every}", model=model, lora={"lora_dropout": 0.1}, micro_batch_tokens=192,
                              activation_checkpointing=every)
        forwards[every] = len(ran)
        assert ("runs again in the backward" in printed) == bool(every)
        assert rundir.read_run(tmp_path / f"a{every}")["train"]["activation_checkpointing"] == every
        assert not any(layer.gradient_checkpointing for layer in model.model.layers)
        assert all("_gradient_checkpointing_func" not in vars(layer) for layer in model.model.layers)
    assert forwards[1] > forwards[0]
    assert md5(tmp_path / "a0") == md5(tmp_path / "a1")


def test_resume_across_a_change_of_activation_checkpointing_gives_the_same_file(tmp_path):
    settings = {"steps": 4, "checkpoint_every": 1, "lora": {"lora_dropout": 0.1}}
    train(tmp_path, "whole", **settings)
    _, trainer, _ = train(tmp_path, "a", stop_after=2, activation_checkpointing=1, **settings)
    assert trainer.done == 2
    train(tmp_path, "a", resume=True, micro_batch_tokens=160, **settings)
    assert md5(tmp_path / "a") == md5(tmp_path / "whole")


def test_activation_checkpointing_above_1_is_refused_where_layers_are_not_fused(tmp_path):
    with pytest.raises(InputError, match=r"activation_checkpointing = 2: model.layers.0 .* allowed are 0 .* and 1"):
        train(tmp_path, "a", activation_checkpointing=2)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="activation_checkpointing = -1"):
        make_invariant(tiny_model(), checkpoint_every=-1)


def test_activation_checkpointing_refuses_layers_without_it(monkeypatch):
    import transformers.modeling_layers as layers

    class Other:
        pass

    model = tiny_model()
    monkeypatch.setattr(layers, "GradientCheckpointingLayer", Other)
    with pytest.raises(InputError, match="LlamaForCausalLM do not take transformers' checkpointing; allowed is 0"):
        make_invariant(model, checkpoint_every=1)
    assert make_invariant(model).recomputed == 0


def test_recomputed_layers_keep_less_for_the_backward():
    from fastlora import stream

    kept = {}
    for every in (0, 1):
        model = inject(tiny_model(), LoraConfig(r=2, lora_dropout=0.1))
        undo = make_invariant(model, checkpoint_every=every)
        assert undo.recomputed == 2 * every
        model.train()
        tokens, total = torch.arange(3, 67)[None], 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        place = stream.Stream((64,), 16, (5,))
        with stream.use(place), exact(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.model(tokens, place.positions()[None], use_cache=False)[0]
        kept[every] = total
        assert hidden.requires_grad
        discard(model)
        undo.undo()
    assert kept[1] < kept[0] / 4


def test_train_config_takes_activation_checkpointing():
    assert TrainConfig(data="d", output="o", activation_checkpointing=3).activation_checkpointing == 3


def test_recompute_layers_leaves_fused_layers_to_themselves():
    model, done = tiny_model(), Invariant()
    paths = ["model.layers.0", "model.layers.1"]
    assert recompute_layers(model, done, 3, paths) == 0
    with pytest.raises(InputError, match=r"activation_checkpointing = 3: model.layers.1 does not run as a fused layer"):
        recompute_layers(model, done, 3, paths[:1])
    assert recompute_layers(model, done, 1, paths[:1]) == 1
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True]
    done.undo()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
