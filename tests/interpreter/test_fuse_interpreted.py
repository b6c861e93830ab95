"""The fused decoder layer against the model's own layers, its sums against the separate path, and every split alike."""

from __future__ import annotations

import copy

import pytest
import torch

from fastlora import LoraConfig, eject, exact, inject
from fastlora.fuse import fuse
from fastlora.invariant import make_invariant
from fastlora.ops import backend
from tests.fuse_cases import FAMILIES, build, gradients, run
from tests.models import EXPERTS, tiny_model

pytestmark = pytest.mark.interpreter

def near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """fp32 sums in two orders, some layers deep: a thousand roundings of the largest element."""
    return bool((got - wanted).abs().max() <= 2.0**-24 * 1000 * wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_agree_with_the_models_own(family):
    model = build(family)
    plain = copy.deepcopy(model)
    undo = make_invariant(plain)
    wanted = run(plain, (2,), "reference")
    undo.undo()
    with backend.use("triton"):
        handle = fuse(model)
    assert not handle.refused and len(handle.layers) == 1
    got = run(model, (2,), "triton")
    assert all(near(g, w) for g, w in zip(got, wanted))
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert all(near(ours[n], theirs[n]) for n in theirs), [n for n in theirs if not near(ours[n], theirs[n])]


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.2), ("gemma3_text", 0.0), ("olmo2", 0.2)])
def test_fused_layers_give_one_sum_for_every_split(family, dropout):
    found = []
    for cuts in (((0, 2),), ((2,), (0,))):
        model = build(family, dropout)
        with backend.use("triton"):
            handle = fuse(model, checkpoint_every=len(cuts) - 1)
        assert handle.layers
        with exact(model):
            for cut in cuts:
                run(model, cut, "triton")
        found.append([s.total.clone() for m in model.modules() if getattr(m, "sums", None) for s in m.sums])
        assert all(bool(t.any()) for t in found[-1])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_fused_layer_takes_any_subset_of_projections_and_ranks():
    lora = {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 17}, "use_rslora": True}
    model = build("llama", **lora)
    plain = copy.deepcopy(model)
    make_invariant(plain)
    wanted = run(plain, (1, 0), "reference")
    with backend.use("triton"):
        assert fuse(model).layers
    got = run(model, (1, 0), "triton")
    assert all(near(g, w) for g, w in zip(got, wanted))
    ours, theirs = gradients(model), gradients(plain)
    assert ours.keys() == theirs.keys() and all(near(ours[n], theirs[n]) for n in theirs)


def test_fuse_keeps_the_state_dict_and_undo_restores_classes_and_weights():
    model = build("llama")
    before = {n: (t.clone(), type(t)) for n, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with backend.use("triton"):
        handle = fuse(model)
        run(model, (0,), "triton")
    weights = model.model.layers[0].self_attn
    assert weights.q_proj.weight.untyped_storage().data_ptr() == weights.k_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(before[n][0], t) for n, t in model.state_dict().items())
    handle.undo()
    assert [type(m) for m in model.modules()] == classes
    assert weights.q_proj.weight.untyped_storage().data_ptr() != weights.k_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(before[n][0], t) for n, t in model.state_dict().items())


def test_fuse_puts_moved_weights_together_again():
    model = build("llama")
    with backend.use("triton"):
        fuse(model)
    first = run(model, (0, 1), "triton")
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.weight.data = module.weight.data.clone()
    assert all(torch.equal(a, b) for a, b in zip(first, run(model, (0, 1), "triton")))


def test_ejected_adapters_are_gone_from_fused_layers_too():
    model = build("llama")
    with backend.use("triton"):
        fuse(model)
    with_adapter = run(model, (2,), "triton")[0]
    eject(model)
    plain = run(model, (2,), "reference")[0]
    assert not torch.equal(with_adapter, plain) and torch.equal(plain, run(model, (2,), "triton")[0])


def test_fuse_refuses_a_layer_whose_own_forward_does_something_else(monkeypatch):
    model = build("llama")
    cls = type(model.model.layers[0])
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, h, *a, **k: h + 1.01 * (own(self, h, *a, **k) - h))
    with backend.use("triton"):
        handle = fuse(model)
    assert not handle.layers and "probe" in handle.refused[0][1]


def test_fuse_leaves_unknown_families_alone():
    model = tiny_model("qwen3_moe", **EXPERTS["qwen3_moe"]).requires_grad_(False)
    inject(model, LoraConfig(r=2))
    with backend.use("triton"):
        handle = fuse(model)
    assert not handle.layers and "qwen3_moe" in handle.refused[0][1]
