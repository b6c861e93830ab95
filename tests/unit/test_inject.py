"""inject and eject: targets, errors with near misses, reproducible starts, nothing else changed."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from fastlora.config import SEVEN, LoraConfig
from fastlora.errors import InputError
from fastlora.families import FAMILIES
from fastlora.inject import eject, inject, injection, lora_layers
from fastlora.merge import merge
from tests.models import raw, tiny_model, tokens


def adapted(model) -> list[str]:
    return [layer.path for layer in lora_layers(model)]


def test_inject_adapts_the_seven_in_place_and_freezes_the_rest():
    model = tiny_model()
    before = raw(model.state_dict().items())
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert inject(model, LoraConfig(r=4)) is model
    assert len(adapted(model)) == 14
    assert {path.rpartition(".")[2] for path in adapted(model)} == set(SEVEN)
    after = raw(model.state_dict().items())
    assert {name: after[name] for name in before} == before
    names = dict(model.named_parameters())
    assert {name: id(names[name]) for name in objects} == objects
    trainable = {name for name, parameter in names.items() if parameter.requires_grad}
    assert trainable == {
        f"{path}.{factor}.weight" for path in adapted(model) for factor in ("lora_A", "lora_B")
    }
    assert all(names[name].dtype == torch.float32 for name in trainable)


@pytest.mark.parametrize("name", ["inject", "merge", "coverage"])
def test_inject_merge_and_coverage_modules_answer_calls(name):
    module = importlib.import_module(f"fastlora.{name}")
    model = tiny_model() if name == "inject" else inject(tiny_model(), LoraConfig(r=2))
    module(model)
    assert len(adapted(model)) == 14


def test_inject_starts_as_the_base_model():
    model, ids = tiny_model(), tokens()
    base = model(ids).logits
    assert torch.equal(inject(model, LoraConfig(r=4))(ids).logits, base)


def test_eject_gives_modules_bytes_and_flags_back():
    model = tiny_model("qwen2")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = raw(model.state_dict().items())
    modules = dict(model.named_modules())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject(model, LoraConfig(r=4, init_lora_weights=False))
    assert eject(model) is model
    assert raw(model.state_dict().items()) == before
    assert all(modules[name] is module for name, module in model.named_modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert injection(model) is None


def test_eject_refuses_a_bare_model():
    with pytest.raises(InputError, match="no adapters"):
        eject(tiny_model())


def test_inject_refuses_a_second_time():
    model = inject(tiny_model(), LoraConfig(r=2))
    with pytest.raises(InputError, match="adapters already"):
        inject(model, LoraConfig(r=2))


def test_inject_draws_by_seed_and_path_alone():
    def factors(seed, **fields):
        model = inject(tiny_model(), LoraConfig(r=4, **fields), seed=seed)
        return {layer.path: layer.lora_A.weight.detach() for layer in lora_layers(model)}

    torch.manual_seed(3)
    state = torch.get_rng_state()
    all_seven, only_q, other = factors(5), factors(5, target_modules=["q_proj"]), factors(6)
    model = tiny_model()
    state = torch.get_rng_state()
    inject(model, LoraConfig(r=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(only_q) == 2
    for path, a in only_q.items():
        assert torch.equal(a, all_seven[path])
        assert not torch.equal(a, other[path])
    drawn = [a.flatten()[:8].tolist() for a in all_seven.values()]
    assert len({tuple(values) for values in drawn}) == len(drawn)


def test_inject_seed_defaults_to_torch_initial_seed():
    given = inject(tiny_model(), LoraConfig(r=2), seed=11)
    model = tiny_model()
    torch.manual_seed(11)
    implied = inject(model, LoraConfig(r=2))
    for one, two in zip(lora_layers(given), lora_layers(implied), strict=True):
        assert torch.equal(one.lora_A.weight, two.lora_A.weight)


def test_inject_initialisations_follow_peft():
    def first(init, rank):
        model = inject(
            tiny_model(hidden_size=64), LoraConfig(r=rank, init_lora_weights=init), seed=1
        )
        layer = next(lora_layers(model))
        return layer.lora_A.weight.detach(), layer.lora_B.weight.detach()

    a, b = first(True, 64)
    assert 0.99 / 8 < a.abs().max() <= 1 / 8 and not b.any()
    a, b = first("gaussian", 64)
    # 4096 draws of standard deviation 1/64: their own deviation is within 5 standard errors of it.
    assert abs(a.std().item() * 64 - 1) < 5 / (2 * a.numel()) ** 0.5 and not b.any()
    a, b = first(False, 64)
    assert a.any() and 0.99 / 8 < b.abs().max() <= 1 / 8


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1},
            ["model.layers.1.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            ["model.layers.0.self_attn.q_proj"],
        ),
        (
            {"target_modules": r".*\.1\..*(up|down)_proj"},
            ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        ),
        (
            {
                "target_modules": ["self_attn.q_proj"],
                "exclude_modules": ["layers.0.self_attn.q_proj"],
            },
            ["model.layers.1.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["k_proj"], "exclude_modules": r"model\.layers\.1\..*"},
            ["model.layers.0.self_attn.k_proj"],
        ),
        ({"target_modules": ["model.layers.0.mlp.gate_proj"]}, ["model.layers.0.mlp.gate_proj"]),
    ],
)
def test_inject_targets_match_as_in_peft(fields, paths):
    assert adapted(inject(tiny_model(), LoraConfig(r=2, **fields))) == paths


def test_inject_all_linear_leaves_the_head_out_and_records_names():
    model = inject(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    assert len(adapted(model)) == 14
    assert injection(model).config.target_modules == sorted(SEVEN)


def test_inject_uses_the_family_projections():
    model = inject(tiny_model("phi3"), LoraConfig(r=2))
    assert {path.rpartition(".")[2] for path in adapted(model)} == set(FAMILIES["phi3"].projections)


def test_inject_follows_rank_and_alpha_patterns():
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"down_proj": 6}, alpha_pattern={"layers.0.*": 3}
    )
    model = inject(tiny_model(), config)
    ranks = {layer.path: (layer.rank, layer.scaling) for layer in lora_layers(model)}
    assert ranks["model.layers.0.mlp.down_proj"] == (6, 0.5)
    assert ranks["model.layers.1.mlp.down_proj"] == (6, 8 / 6)
    assert ranks["model.layers.1.mlp.up_proj"] == (4, 2.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_prj"]}, ["'q_prj'", "matches nothing", "q_proj"]),
        (
            {"target_modules": ["self_attn.q_prox"]},
            ["matches nothing", "model.layers.0.self_attn.q_proj"],
        ),
        ({"target_modules": ["zzz"]}, ["matches nothing", "down_proj, gate_proj"]),
        ({"target_modules": r"q_proj"}, ["matches nothing", "whole path"]),
        (
            {"target_modules": ["q_proj", "self_attn.q_proj"]},
            ["matched twice", "'q_proj' and 'self_attn.q_proj'"],
        ),
        ({"target_modules": ["mlp"]}, ["LlamaMLP", "torch.nn.Linear", "mlp.gate_proj"]),
        ({"target_modules": ["input_layernorm"]}, ["LlamaRMSNorm", "torch.nn.Linear"]),
        ({"target_modules": ["embed_tokens"]}, ["embed_tokens is the table of token embeddings"]),
        ({"exclude_modules": ["q_prj"]}, ["exclude_modules", "'q_prj'", "q_proj"]),
        ({"exclude_modules": ["q_proj"]}, ["'q_proj'", "leave none"]),
        ({"rank_pattern": {"q_prj": 4}}, ["rank_pattern", "'q_prj'", "q_proj"]),
        ({"alpha_pattern": {"lm_head": 4}}, ["alpha_pattern", "'lm_head'"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 7},
            ["'q_proj'", "layers_to_transform=7"],
        ),
    ],
)
def test_inject_refuses_targets_and_leaves_the_model_alone(fields, words):
    model = tiny_model()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(InputError) as caught:
        inject(model, LoraConfig(r=2, **fields))
    for word in words:
        assert word in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inject_names_tying_when_the_head_is_tied():
    for names in (["q_proj", "lm_head"], r".*(q_proj|lm_head)"):
        with pytest.raises(InputError, match="lm_head is the output head.* tied to the token embeddings.*untied before inject"):
            inject(tiny_model("gemma"), LoraConfig(r=2, target_modules=names))


def test_inject_takes_a_head_untied_as_the_error_says():
    model = tiny_model("gemma")
    table = model.model.embed_tokens.weight.detach().clone()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    inject(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    before = model.lm_head.weight.detach().clone()
    merge(model)
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("names", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_inject_adapts_an_untied_head_by_name(names):
    assert adapted(inject(tiny_model(), LoraConfig(r=2, target_modules=names)))[-1] == "lm_head"


def test_inject_refuses_shared_and_special_linears():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.three = self.one
            self.conv = nn.Conv1d(4, 4, 1)

    net = Net()
    with pytest.raises(InputError, match="one is matched twice: the same module stands at three"):
        inject(net, LoraConfig(r=2, target_modules=["one"]))
    net = Net()
    net.two.weight = net.one.weight
    with pytest.raises(InputError, match="weight of two is tied to one.weight"):
        inject(net, LoraConfig(r=2, target_modules=["two"]))
    with pytest.raises(InputError, match="conv is a Conv1d"):
        inject(net, LoraConfig(r=2, target_modules=["conv"]))
    net = Net()
    net.two.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="two carries hooks"):
        inject(net, LoraConfig(r=2, target_modules=["two"]))

    class Quantised(nn.Linear):
        def forward(self, x):
            return x

    net.two = Quantised(4, 4)
    with pytest.raises(InputError, match="two is a Quantised with a forward of its own"):
        inject(net, LoraConfig(r=2, target_modules=["two"]))
