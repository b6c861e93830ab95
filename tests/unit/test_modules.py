"""LoraLinear: masters in fp32, autocast, dropout, checkpointing, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import stream
from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.inject import eject, inject, lora_layers
from tests.models import raw, tiny_model, tokens


def test_lora_linear_masters_stay_fp32_under_casts():
    model = inject(tiny_model(), LoraConfig(r=4), seed=2)
    before = raw((name, p) for name, p in model.named_parameters() if "lora_" in name)
    model.to(torch.bfloat16)
    layer = next(lora_layers(model))
    assert layer.weight.dtype == torch.bfloat16
    assert raw((name, p) for name, p in model.named_parameters() if "lora_" in name) == before
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_lora_linear_autocast_gives_the_bits_of_the_cast_layer():
    model = inject(tiny_model(), LoraConfig(r=4, init_lora_weights=False))
    layer, x = next(lora_layers(model)), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    direct = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and torch.equal(y, direct)


def test_lora_linear_dropout_draws_anew_and_repeats_by_seed():
    model = inject(tiny_model(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    layer, x = next(lora_layers(model)), torch.randn(6, 32)
    torch.manual_seed(4)
    one, two = layer(x), layer(x)
    torch.manual_seed(4)
    assert torch.equal(layer(x), one)
    assert not torch.equal(one, two)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_lora_linear_dropout_mask_is_its_own_for_every_projection():
    model = inject(tiny_model(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    q = model.model.layers[0].self_attn.q_proj
    twin = copy.deepcopy(q)
    twin.path = q.path.replace("q_proj", "other")
    x = torch.randn(16, 32)
    with stream.use(stream.Stream(lengths=(10,), alignment=16, sample_ids=(7,), seed=1, step=2)):
        assert torch.equal(q(x), q(x))
        assert not torch.equal(q(x), twin(x))


def test_lora_linear_dropout_refuses_rows_outside_the_stream():
    model = inject(tiny_model(), LoraConfig(r=4, lora_dropout=0.5))
    layer = next(lora_layers(model))
    active = stream.Stream(lengths=(10,), alignment=16, sample_ids=(7,))
    with stream.use(active), pytest.raises(InputError, match=f"{layer.path}: the input has 5 rows"):
        layer(torch.randn(5, 32))


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_linear_checkpoint_repeats_the_mask(reentrant):
    model = inject(tiny_model(), LoraConfig(r=4, lora_dropout=0.3, init_lora_weights=False))
    layer = next(lora_layers(model))
    x = torch.randn(6, 32, requires_grad=True)

    def gradients(call):
        torch.manual_seed(9)
        layer.zero_grad()
        y = call(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return raw([("a", layer.lora_A.weight.grad), ("b", layer.lora_B.weight.grad)])

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert again == plain


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_linear_compiles_without_a_graph_break(dropout):
    model = inject(tiny_model(), LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False))
    layer = next(lora_layers(model))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(call):
        torch.manual_seed(6)
        layer.zero_grad()
        x = torch.linspace(-1, 1, 160).view(5, 32).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        return raw([("y", y), ("x", x.grad), ("b", layer.lora_B.weight.grad)])

    assert run(compiled) == run(layer)


def test_lora_linear_deepcopy_is_independent():
    model = inject(tiny_model(), LoraConfig(r=4))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(lora_layers(twin)).lora_B.weight.fill_(1.0)
    assert not next(lora_layers(model)).lora_B.weight.any()
    eject(twin)
    assert not list(lora_layers(twin)) and list(lora_layers(model))
