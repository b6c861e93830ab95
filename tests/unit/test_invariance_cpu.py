"""make_invariant: one model's bits, forward, backward and sums, for every split and thread count."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fastlora import LoraConfig, exact, inject, stream
from fastlora.blocks import single_thread
from fastlora.errors import InputError
from fastlora.families import head_of
from fastlora.invariant import FrozenLinear, make_invariant
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from tests.models import EXPERTS, ON_EXPERTS

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 67,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMOLLM2 = {
    **TINY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "smollm2": LlamaConfig(**SMOLLM2),
    "qwen3": Qwen3Config(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=40),
    "gemma2": Gemma2Config(**TINY, sliding_window=40, query_pre_attn_scalar=12),
    "qwen3_moe": Qwen3MoeConfig(**TINY, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}
ADAPTED_EXPERTS = {f"{name} with adapters on experts": name for name in EXPERTS}
LENGTHS = (150, 17, 60)


def build(config, dropout=0.1, targets=None, **keywords):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).requires_grad_(False)
    keywords |= {"target_modules": targets} if targets else {}
    inject(model, LoraConfig(r=4, lora_dropout=dropout, **keywords), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.train()


def documents(vocabulary):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=g) for n in LENGTHS]


def step(model, cut, threads, exactly=True):
    """(hidden rows of each document, all integer sums, loss units) of one global batch."""
    texts = documents(model.config.vocab_size)
    head, rows, units = head_of(model), {}, 0
    torch.set_num_threads(threads)
    with single_thread(), exact(model) if exactly else contextlib.nullcontext():
        for part in cut:
            made = stream.Stream(tuple(LENGTHS[i] for i in part), 16, part, seed=3, step=5)
            ids = torch.zeros(made.total, dtype=torch.int64)
            labels = torch.full((made.total,), -100)
            for i, (start, _) in zip(part, made.spans):
                stop = start + LENGTHS[i]
                ids[start:stop] = texts[i]
                labels[start : stop - 1] = texts[i][1:]
            with stream.use(made):
                hidden = head.decoder(ids[None], position_ids=made.positions()[None])[0]
                record = LossRecord()
                loss, _ = linear_cross_entropy(
                    hidden,
                    head.weight,
                    labels,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                    record=record,
                )
                loss.backward()
            units += record.units
            for i, (start, stop) in zip(part, made.spans):
                rows[i] = hidden[start:stop].detach().clone()
    totals = []
    for module in model.modules():
        for total in getattr(module, "sums", None) or ():
            totals.append(total.total.clone())
            total.zero_()
            total.pending = False
    return [rows[i] for i in range(len(LENGTHS))], totals, units


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*CONFIGS, *ADAPTED_EXPERTS])
def test_make_invariant_one_result_for_every_split_and_thread_count(name):
    model = build(CONFIGS[name]) if name in CONFIGS else build(CONFIGS[ADAPTED_EXPERTS[name]], dropout=0.0, **ON_EXPERTS)
    done = make_invariant(model)
    assert done.not_exact == []
    rows, totals, units = step(model, [(0, 1, 2)], 1)
    assert all(total.any() for total in totals)
    for cut, threads in (
        ([(0,), (1,), (2,)], 1),
        ([(0, 1, 2)], 2),
        ([(2, 0), (1,)], 4),
        ([(1, 2, 0)], 2),
    ):
        found = step(model, cut, threads)
        assert found[2] == units
        assert all(torch.equal(one, two) for one, two in zip(found[0], rows))
        assert all(torch.equal(one, two) for one, two in zip(found[1], totals))


def test_make_invariant_float_sums_do_depend_on_the_split():
    """The control: the same cuts with ordinary gradients differ, so the check above can fail."""
    model = build(CONFIGS["llama"])
    make_invariant(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for cut in ([(0, 1, 2)], [(2, 0), (1,)]):
        step(model, cut, 1, exactly=False)
        results.append([p.grad.clone() for p in trained])
        for parameter in trained:
            parameter.grad = None
    assert not all(torch.equal(one, two) for one, two in zip(*results))


def test_make_invariant_agrees_with_eager_attention_to_rounding():
    """The same document through transformers' own eager path, in float64, as a yardstick."""
    for name in ("llama", "gemma2", "mistral"):
        model = build(CONFIGS[name], dropout=0.0).eval()
        ids = documents(model.config.vocab_size)[0][None]
        truth = copy.deepcopy(model).double()
        # lora_linear takes no float64: fold the adapter into the weights of the float64 copy
        for module in truth.modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A.weight.double(), module.lora_B.weight.double()
                module.weight.data += module.scaling * b @ a
                module.merged = True
        truth.set_attn_implementation("eager")
        wanted = truth.get_decoder()(ids).last_hidden_state
        model.set_attn_implementation("eager")
        eager = model.get_decoder()(ids).last_hidden_state
        make_invariant(model)
        made = stream.Stream((LENGTHS[0],), 16, (0,))
        padded = nn.functional.pad(ids, (0, made.total - ids.shape[1]))
        with stream.use(made):
            ours = model.get_decoder()(padded, position_ids=made.positions()[None])
        ours = ours.last_hidden_state[:, : ids.shape[1]]
        error, yardstick = ((x - wanted).abs().max() for x in (ours, eager))
        # tolerance-rule: another order of the same sums; transformers' own error is the yardstick
        assert error <= 4 * yardstick + 2.0**-22 * wanted.abs().max(), name


def test_make_invariant_undo_restores_classes_dropouts_and_attention():
    model = build(LlamaConfig(**TINY, attention_dropout=0.2), targets=["q_proj"])
    before = [type(module) for module in model.modules()]
    names, implementation = list(model.state_dict()), model.config._attn_implementation
    done = make_invariant(model)
    assert any(type(module) is FrozenLinear for module in model.modules())
    assert type(model.lm_head) is nn.Linear
    assert list(model.state_dict()) == names
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.config._attn_implementation == "fastlora"
    done.undo()
    assert [type(module) for module in model.modules()] == before
    assert model.model.layers[0].self_attn.attention_dropout == 0.2
    assert model.config._attn_implementation == implementation


def test_make_invariant_moves_weights_to_whole_lines():
    model = build(CONFIGS["llama"])
    weight = model.model.embed_tokens.weight
    odd = torch.empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight.data)
    wanted = odd.clone()
    weight.data = odd
    assert weight.data_ptr() % 64
    make_invariant(model)
    assert weight.data_ptr() % 64 == 0
    assert torch.equal(weight.data, wanted)


def test_make_invariant_names_what_is_not_exact():
    model = build(CONFIGS["llama"])
    model.model.norm.weight.requires_grad_(True)
    assert [path for path, _ in make_invariant(model).not_exact] == ["model.norm"]


def test_make_invariant_names_rope_that_looks_at_the_batch():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    done = make_invariant(build(LlamaConfig(**TINY, rope_parameters=rope)))
    assert "dynamic" in done.not_exact[0][1]


def test_make_invariant_undo_puts_the_experts_implementation_back():
    model = build(CONFIGS["qwen3_moe"])
    before = model.config._experts_implementation
    done = make_invariant(model)
    assert model.config._experts_implementation == "eager" != before
    done.undo()
    assert model.config._experts_implementation == before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MixtralConfig(**TINY, num_local_experts=2, router_jitter_noise=0.1), "router_jitter_noise is 0.1"),
        (MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32), "across the documents"),
        (Qwen3Config(**TINY, layer_types=["full_attention", "chunked_attention"]), "chunked"),
    ],
)
def test_make_invariant_refuses_layers_that_look_across_documents(config, named):
    model = AutoModelForCausalLM.from_config(config)
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=named):
        make_invariant(model)
    assert [type(module) for module in model.modules()] == before


def test_make_invariant_turns_dropout_modules_off():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, resid_pdrop=0.2)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    done = make_invariant(model)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    # transformers' Conv1D is no linear layer of torch: its products are named, not hidden
    assert any(path.endswith("c_attn") for path, _ in done.not_exact)
    done.undo()
    assert 0.2 in {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
