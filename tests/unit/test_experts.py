"""Adapters on experts: in and out of a model, routing, sums, refusals, exports and a whole run."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fastlora import certificate
from fastlora.adapter import adapter_state, save_adapter
from fastlora.config import LoraConfig
from fastlora.coverage import coverage_lines
from fastlora.digest import adapter_tensors
from fastlora.errors import InputError, TrainingError
from fastlora.exact import exact
from fastlora.experts import LoraExperts
from fastlora.gguf_export import write_adapter
from fastlora.inject import eject, inject, lora_layers
from fastlora.merge import merge, merge_cost, unmerge
from fastlora.vllm_export import export_for_vllm
from tests.models import EXPERTS, ON_EXPERTS, raw, tiny_model, tokens
from tests.unit.tiny_run import run_command, train, write_rows
from tests.unit.tiny_tokenizer import make_tokenizer

FAMILIES = sorted(EXPERTS)


def adapted(model_type="qwen3_moe", **fields):
    model = tiny_model(model_type, **EXPERTS[model_type])
    return inject(model, LoraConfig(**({"r": 3, "init_lora_weights": False} | ON_EXPERTS | fields)), seed=1)


def module(model) -> LoraExperts:
    return next(m for m in model.modules() if isinstance(m, LoraExperts))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_inject_and_eject_leave_experts_as_they_were(model_type):
    model = tiny_model(model_type, **EXPERTS[model_type])
    bytes_before, classes = raw(model.state_dict().items()), [type(m) for m in model.modules()]
    objects = {name: id(p) for name, p in model.named_parameters()}
    inject(model, LoraConfig(r=3, **ON_EXPERTS))
    added = {n: p for n, p in model.named_parameters() if n not in objects}
    assert {n: id(p) for n, p in model.named_parameters() if n in objects} == objects
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(added)
    assert sum("experts.base_layer.lora_" in n for n in added) == 4 and len(added) == 2 * 2 * (4 + 2)
    assert adapter_tensors(model).keys() == adapter_state(model).keys()
    assert all(id(p) in map(id, added.values()) for p in model.parameters() if p.requires_grad)
    eject(model)
    assert raw(model.state_dict().items()) == bytes_before
    assert [type(m) for m in model.modules()] == classes and all(p.requires_grad for p in model.parameters())


def test_inject_draws_experts_by_the_parameter_and_not_by_other_targets():
    both, alone = adapted(), adapted(target_modules=[], target_parameters=["experts.gate_up_proj"])
    of = {layer.target: layer for layer in lora_layers(both)}
    assert [layer.path for layer in lora_layers(alone)] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for layer in lora_layers(alone):
        twin = of[layer.target]
        assert twin.path == f"{layer.path}.base_layer"
        assert torch.equal(layer.lora_A.weight, twin.lora_A.weight) and torch.equal(
            layer.lora_B.weight, twin.lora_B.weight
        )
    first = of["model.layers.0.mlp.experts.down_proj"].lora_A.weight
    assert not torch.equal(first, of["model.layers.1.mlp.experts.down_proj"].lora_A.weight)
    assert all(not layer.lora_B.weight.any() for layer in lora_layers(adapted(init_lora_weights=True)))


def test_coverage_has_a_line_for_experts():
    assert "reference: down_proj x2, gate_up_proj x2 (device is cpu, one expert after the other)" in coverage_lines(
        adapted()
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merge_of_experts_and_the_very_same_bytes_back(model_type):
    model, ids = adapted(model_type).eval(), tokens()
    before, logits = raw(model.state_dict().items()), model(ids).logits
    layers = [layer for layer in lora_layers(model) if "experts" in layer.target]
    wanted = []
    for layer in layers:
        count, rows, columns = layer.weight.shape
        a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
        change = torch.einsum("ore,eri->eoi", b.view(rows, 3, count), a.view(count, 3, columns))
        wanted.append(layer.weight.double() + layer.scaling * change)
    assert merge_cost(model) == sum(layer.weight.nbytes for layer in lora_layers(model))
    merge(model)
    for layer, exactly in zip(layers, wanted):
        # one rounding to fp32, of a sum that float64 rounds at 2^-53
        assert ((layer.weight.double() - exactly).abs() <= 2.0**-23 * exactly.abs()).all()
    gap = (model(ids).logits - logits).norm()
    assert 0 < gap < 2.0**-18 * logits.norm()
    unmerge(model)
    assert raw(model.state_dict().items()) == before
    assert torch.equal(model(ids).logits, logits)


def test_an_expert_that_no_token_went_to_has_no_gradient_and_moves_nothing():
    model = adapted()
    experts, g = module(model), torch.Generator().manual_seed(0)
    x, weights = torch.randn(10, 32, generator=g), torch.rand(10, 2, generator=g)
    index = torch.tensor([[0, 2], [2, 0]] * 5)
    out = experts(x, index, weights)
    out.square().sum().backward()
    gradients = []
    for adapter in experts.adapters:
        by_expert = adapter.lora_A.weight.grad.view(4, 3, -1), adapter.lora_B.weight.grad.view(-1, 3, 4).movedim(2, 0)
        for gradient in by_expert:
            assert [bool(of_one.any()) for of_one in gradient] == [True, False, True, False]
        gradients += [adapter.lora_A.weight.grad, adapter.lora_B.weight.grad]
    experts.zero_grad()
    # beyond the experts: what another process computes
    assert torch.equal(experts(x, torch.tensor([[4, 4]] * 10), weights), torch.zeros_like(x))
    assert torch.equal(experts(x, torch.tensor([[0, 4], [4, 0]] * 5), weights * (index == 0)),
                       experts(x, index, weights * (index == 0)))  # fmt: skip
    with exact(model):
        experts(x, index, weights).square().sum().backward()
    sums = [total for adapter in experts.adapters for total in adapter.sums]
    for total, gradient in zip(sums, gradients):
        found = total.gradient(1.0)
        assert total.chunks == 2  # one for each of two experts
        assert torch.equal(found != 0, gradient != 0)
        # each of two partials was rounded to 2^-40 once
        assert ((found - gradient).abs() <= 2.0**-39 + 2.0**-23 * gradient.abs()).all()
    assert all(p.grad is None for p in model.parameters())


def test_exact_sums_of_experts_take_nothing_after_their_block():
    model = adapted()
    with exact(model):
        loss = model(tokens()).logits.sum()
    with pytest.raises(TrainingError, match="whose block has ended"):
        loss.backward()
    assert all(total.chunks == 0 and not total.total.any() for layer in lora_layers(model) for total in layer.sums)


def test_experts_follow_copies_and_casts():
    model, ids = adapted(), tokens()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        module(twin).gate_up_proj.zero_()
        module(twin).base_layer.lora_B.weight.zero_()
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    assert module(twin).base_layer.weight is module(twin).gate_up_proj is not module(model).gate_up_proj
    cast = copy.deepcopy(model).bfloat16()
    assert module(cast).gate_up_proj.dtype == torch.bfloat16
    assert all(layer.lora_B.weight.dtype == torch.float32 for layer in lora_layers(cast))
    logits = cast(ids).logits
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16 and all(layer.lora_B.weight.grad.any() for layer in lora_layers(cast))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_porj"]}, "allowed: mlp.experts.gate_up_proj, .*near misses"),
        (
            {"target_parameters": ["experts.down_proj", "xx"]},
            "target_parameters: 'xx': matches nothing; allowed: mlp.experts.down_proj",
        ),
        (
            {"target_parameters": ["experts.down_proj", "down_proj"]},
            "is matched twice, by 'down_proj' and 'experts.down_proj'",
        ),
        (
            {"target_parameters": ["0.self_attn.q_proj.weight"]},
            r"belongs to a linear layer; give target_modules=\['q_proj'\]",
        ),
        (
            {"target_parameters": ["1.mlp.gate.weight"]},
            "belongs to a Qwen3MoeTopKRouter .* allowed are gate_up_proj and down_proj",
        ),
        ({"layers_to_transform": 1}, "layers_to_transform is 1 beside target_parameters"),
        (
            {"exclude_modules": ["layers.0.mlp.experts"]},
            "exclude_modules is .* matches model.layers.0.mlp.experts.*excludes no parameter",
        ),
        ({"rank_pattern": {"experts.up_proj": 2}}, "rank_pattern: 'experts.up_proj' matches none of the targets"),
    ],
)
def test_inject_refuses_parameters_by_name(fields, message):
    model = tiny_model("qwen3_moe", **EXPERTS["qwen3_moe"])
    with pytest.raises(InputError, match=message):
        inject(model, LoraConfig(**ON_EXPERTS | fields))
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_inject_refuses_experts_that_it_cannot_run_or_that_are_watched():
    with pytest.raises(InputError, match="keeps no experts as parameters, give target_modules"):
        inject(tiny_model(), LoraConfig(**ON_EXPERTS))
    model = tiny_model("qwen3_moe", **EXPERTS["qwen3_moe"])
    model.config.model_type = "unheard-of"
    with pytest.raises(InputError, match="model type 'unheard-of'; allowed are .* of qwen3_moe, mixtral"):
        inject(model, LoraConfig(**ON_EXPERTS, target_modules=["q_proj"]))
    model = tiny_model("mixtral", **EXPERTS["mixtral"])
    first, second = (model.model.layers[i].mlp.experts for i in range(2))
    handle = second.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts carries hooks"):
        inject(model, LoraConfig(**ON_EXPERTS))
    handle.remove()
    second.down_proj = first.down_proj
    with pytest.raises(InputError, match="is the same parameter as model.layers.1.mlp.experts.down_proj"):
        inject(model, LoraConfig(**ON_EXPERTS))


def test_exports_of_the_adapter_alone_refuse_experts(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(InputError, match="format vllm: the adapter is on expert weights"):
        export_for_vllm(tmp_path / "adapter", tmp_path / "vllm")
    with pytest.raises(InputError, match="format gguf: the adapter is on expert weights"):
        write_adapter(tmp_path / "adapter", tmp_path / "x.gguf", AutoConfig.for_model("qwen3"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_tensor_roundings_finds_one_element_of_one_expert(tmp_path):
    layers = list(lora_layers(merge(adapted("mixtral", target_modules=[]))))
    tensors = {layer.weight_name: layer.weight.detach().clone() for layer in layers}
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(certificate.tensor_roundings(layers, tmp_path)) == 4
    name = layers[1].weight_name
    tensors[name][2, 5, 7] *= 1 + 4 * torch.finfo(torch.float32).eps
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match=f"{name} was written"):
        certificate.tensor_roundings(layers, tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_trainer_on_attention_and_experts_gives_one_adapter_for_every_cut(model_type, tmp_path):
    size = {"vocab_size": 330, "max_position_embeddings": 512}
    found = []
    for name, settings in (
        ("one", {"micro_batch_tokens": 4096}),
        ("cut", {"micro_batch_tokens": 160, "activation_checkpointing": 1}),
    ):
        model = tiny_model(model_type, **size | EXPERTS[model_type])
        result, _, printed = train(tmp_path, name, model=model, lora=ON_EXPERTS, **settings)
        assert "exact under splitting: on this CPU" in printed
        found.append(result)
    assert found[0].digest == found[1].digest
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == (
        tmp_path / "cut/adapter_model.safetensors"
    ).read_bytes()
    tensors = found[0].report["tensors"]
    assert sum("experts" in row["name"] for row in tensors) == 8
    assert all(row["changed"] > 0 for row in tensors)
    assert found[0].losses[-1][1] < found[0].losses[0][1]


def test_train_command_on_experts_stopped_and_resumed(tmp_path, capsys):
    model = tiny_model("qwen3_moe", vocab_size=330, max_position_embeddings=512, **EXPERTS["qwen3_moe"])
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl")
    common = ["train", "--model", tmp_path / "base", "--data", data, "--rank", "4", "--batch-size", "6", "--target-parameters",
              "mlp.experts.gate_up_proj, mlp.experts.down_proj", "--learning-rate", "1e-2"]  # fmt: skip
    whole = run_command(capsys, *common, "--output", tmp_path / "whole", "--steps", "2")
    assert whole[0] == 0 and "gate_up_proj x2" in whole[1]
    lora = ON_EXPERTS | {"base_model_name_or_path": str(tmp_path / "base")}
    train(tmp_path, "cut", model=model, lora=lora, data=data, steps=2, checkpoint_every=1, stop_after=1)
    again = copy.deepcopy(eject(model))
    train(
        tmp_path,
        "cut",
        model=again,
        lora=lora,
        data=data,
        steps=2,
        checkpoint_every=1,
        resume=True,
        micro_batch_tokens=160,
    )
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert raw(one.items()) == raw(two.items()) and len(one) == 2 * 2 * (4 + 2)
