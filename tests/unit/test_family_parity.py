"""Every family in small against transformers' own code: logits, loss and gradients, bare and with adapters, in fp32.

The truth is transformers' own model in float64, one document at a time, eager attention, with W + s B A as weights where there is
an adapter. Ours is the trainer's way: one stream of all documents, fixed tiles, the loss without logits, exact sums. The yardstick
is what transformers' own model in fp32 is away from the truth.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastlora import packing, stream
from fastlora.blocks import single_thread
from fastlora.config import LoraConfig
from fastlora.data import make_row
from fastlora.exact import exact
from fastlora.families import FAMILIES
from fastlora.inject import inject, lora_layers
from fastlora.invariant import make_invariant
from fastlora.setup import Objective
from tests.models import EXPERTS, ON_EXPERTS, tiny_model

# What a family has of its own, switched on and away from values that hide it.
OWN = {
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 11, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 11},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 3.0},
    "qwen3_moe": EXPERTS["qwen3_moe"] | {"norm_topk_prob": True},
    "mixtral": EXPERTS["mixtral"] | {"sliding_window": None},
}
LENGTHS = (23, 7, 40)
TARGETS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "qwen3_moe",
           "mixtral")  # fmt: skip


def build(model_type):
    size = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "initializer_range": 0.1}
    model = tiny_model(model_type, **size | OWN.get(model_type, {})).eval()
    g = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases of a fresh model are all alike
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
        elif name.endswith("gate.weight"):  # a router's rows of zeros would send every token to the same experts
            parameter.data.copy_(torch.randn(parameter.shape, generator=g))
    return model


def rows():
    g = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 96, (n,), generator=g).tolist() for n in LENGTHS]
    return [make_row(ids, [i % 3 > 0 for i in range(len(ids))], 1, "text") for ids in texts]


def transformers_own(model, dtype, factors):
    """(logits of each document, loss, gradients of the embeddings' output or of A and B) by transformers' model in ``dtype``."""
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    trained = [tuple(t.detach().to(dtype).requires_grad_() for t in (a, b)) for _, a, b, _ in factors]
    weights = dict(model.named_parameters())
    for (name, _, _, s), (a, b) in zip(factors, trained):
        weights[name] = weights[name] + s * delta(a, b, weights[name].shape)
    logits, loss, inputs = [], 0.0, []
    for row in rows():
        ids, labels = torch.tensor(row.input_ids)[None].long(), torch.tensor(row.labels).long()
        with embedded(model) as seen:
            out = functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
        inputs += seen
        logits.append(out.detach())
        loss = loss + cross_entropy(out[:-1], labels[1:], ignore_index=-100, reduction="sum")
    wanted = [t for pair in trained for t in pair] or inputs
    gradients = torch.autograd.grad(loss, wanted)
    return logits, loss.detach(), [g.reshape(-1, g.shape[-1]) for g in gradients]


def delta(a, b, shape):
    """B A; for the weights of all experts [E, N, K] PEFT's: A [E r, K] one expert after another, B [N, r E] an expert a column."""
    if len(shape) == 2:
        return b @ a
    count, rows, columns = shape
    return torch.einsum("ore,eri->eoi", b.view(rows, -1, count), a.view(count, -1, columns))


class embedded:
    """Outputs of the embeddings inside the block, made to require a gradient where nothing else does."""

    def __init__(self, model):
        self.module, self.seen = model.get_input_embeddings(), []

    def __enter__(self):
        def keep(_module, _inputs, output):
            self.seen.append(output.requires_grad_())

        self.handle = self.module.register_forward_hook(keep)
        return self.seen

    def __exit__(self, *_):
        self.handle.remove()


def ours(model, adapted):
    """The same by the trainer's way."""
    done = make_invariant(model)
    # every family is exact on the CPU as a whole
    assert done.not_exact == []
    documents = rows()
    batch = packing.collate(documents, packing.sample_ids(documents), 16)
    objective = Objective(model)
    assert objective.head is not None
    with single_thread(), stream.use(batch.stream):
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        if adapted:
            with exact(model):
                loss = objective(batch).total
                loss.backward()
            gradients = [total.gradient(1.0) for layer in lora_layers(model) for total in layer.sums]
        else:
            with embedded(model) as seen:
                loss = objective(batch).total
            (whole,) = torch.autograd.grad(loss, seen)
            gradients = [whole[0, start : start + n] for (start, _), n in zip(batch.stream.spans, LENGTHS)]
    logits = [out[start : start + n] for (start, _), n in zip(batch.stream.spans, LENGTHS)]
    return logits, loss.detach(), gradients


def check(found, own, truth):
    """Tensor by tensor, each against its own size."""
    for name, ours_of, own_of, truth_of in zip(("logits", "loss", "gradients"), found, own, truth):
        if name == "loss":
            ours_of, own_of, truth_of = [ours_of], [own_of], [truth_of]
        assert len(ours_of) == len(truth_of)
        for mine, theirs, exact_one in zip(ours_of, own_of, truth_of):
            scale = exact_one.norm()
            # lengths, because the largest of a few hundred roundings is a matter of luck
            error, yardstick = ((t.double() - exact_one).norm() for t in (mine, theirs))
            # tolerance-rule: another order of the same fp32 sums; transformers' own error is the yardstick, floored at four units
            assert error <= 4 * yardstick + 2.0**-22 * scale, (name, float(error), float(yardstick), float(scale))
            assert scale > 2.0**-10


def test_parity_covers_every_family():
    assert set(FAMILIES) - set(TARGETS) == {"gemma"}


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("model_type", TARGETS)
def test_family_agrees_with_transformers(model_type, adapted):
    model, plain, factors = prepared(model_type, adapted)
    assert len(factors) == 2 * len(FAMILIES[model_type].projections) * adapted
    check(ours(model, adapted), *(transformers_own(plain, dtype, factors) for dtype in (torch.float32, torch.float64)))


@pytest.mark.parametrize("fields", [ON_EXPERTS, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
                                    {"target_modules": [], "target_parameters": ["experts.down_proj"]}])  # fmt: skip
@pytest.mark.parametrize("model_type", sorted(EXPERTS))
def test_family_with_adapters_on_experts_agrees_with_transformers(model_type, fields):
    model, plain, factors = prepared(model_type, True, **fields)
    on_attention = 0 if fields is not ON_EXPERTS else 4
    assert len(factors) == 2 * (on_attention + len(fields["target_parameters"]))
    check(ours(model, True), *(transformers_own(plain, dtype, factors) for dtype in (torch.float32, torch.float64)))


def prepared(model_type, adapted, **fields):
    """(model, a copy without adapters, (name of the weight, A, B, s) of each adapter)"""
    model = build(model_type)
    plain = copy.deepcopy(model)
    if not adapted:
        return model.requires_grad_(False), plain, []
    inject(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields), seed=0)
    return model, plain, [(m.weight_name, m.lora_A.weight, m.lora_B.weight, m.scaling) for m in lora_layers(model)]


def test_parity_sees_one_scaling_that_is_a_thousandth_off():
    model, plain, factors = prepared("llama", True)
    found = ours(model, True)
    wrong = [(name, a, b, s * (1.001 if i == 1 else 1)) for i, (name, a, b, s) in enumerate(factors)]
    with pytest.raises(AssertionError, match="gradients|logits"):
        check(found, *(transformers_own(plain, dtype, wrong) for dtype in (torch.float32, torch.float64)))
