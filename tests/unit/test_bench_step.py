"""The step level on a tiny model: every system that runs without a GPU, what is refused, and what is not timed."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch

from bench import check, step, systems, tables
from bench.shapes import SHAPES, build, shape_named
from fastlora.errors import InputError
from fastlora.exact import lora_modules
from fastlora.modules import LoraLinear

TINY = SHAPES["tiny"]
RUNS = (
    "fastlora", "fastlora+ckpt", "fastlora+float", "fastlora+dropout", "fastlora+rows", "fastlora+library+align32", "peft",
    "peft+ckpt", "peft+dropout", "peft+rows", "frozen+rows",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products on two workers of two threads each would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan(**options) -> step.Plan:
    options = {"tokens": 160, "rank": 4, "samples": 1, "say": lambda line: None} | options
    return step.plan_for(TINY, "cpu", **options)


def test_run_times_every_system_that_runs_on_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.timing.WORK_MS", 1.0)
    path = tmp_path / "step.json"
    step.run(plan(), RUNS, path)
    result = json.loads(path.read_text())
    rows = {row["system"]: row for row in result["rows"]}
    assert {name: row["not_timed"] for name, row in rows.items() if "not_timed" in row} == {}
    assert list(rows) == ["frozen", *RUNS]
    assert result["provenance"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert all(row["control"]["median"] > 0 and row["time"]["median_ms"] > 0 for row in rows.values())
    assert rows["fastlora"]["verified"]["notes"] == ["two cuts of the documents: the same bits"]
    assert rows["fastlora"]["verified"]["worst_share"] <= 1.0
    assert rows["fastlora"]["with_optimizer"]["median_ms"] > 0
    assert rows["fastlora"]["supervised_tokens"] == rows["peft"]["supervised_tokens"] == 159
    assert rows["fastlora+rows"]["padded_tokens"] <= 160
    assert rows["peft+rows"]["tokens"] >= rows["fastlora+rows"]["tokens"]
    assert result["fill"]["rows"]["32"] > result["fill"]["rows"]["128"]


@pytest.mark.slow
def test_run_times_compiled_systems(tmp_path):
    found = step.run(plan(), ["frozen+compile", "peft+layers"], None)
    assert ["time" in row for row in found["rows"]] == [True, True, True]


def test_run_says_why_a_system_has_no_figures(monkeypatch):
    monkeypatch.setattr("bench.peers.installed", lambda package: False)
    found = step.run(plan(), ["peft", "frozen+liger", "fastlora+cap23"], None)
    reasons = [row.get("not_timed", "") for row in found["rows"]]
    assert reasons[0] == ""
    assert "peft is not installed" in reasons[1]
    assert "liger_kernel is not installed" in reasons[2]
    assert "on a GPU alone" in reasons[3]


def test_run_refuses_the_non_exact_configuration_without_kernels():
    found = step.run(plan(), ["fastlora+nonexact"], None)
    assert "made of fused layers; on cpu" in found["rows"][1]["not_timed"]


def test_run_says_and_stores_what_exactness_costs(monkeypatch):
    monkeypatch.setattr("bench.timing.WORK_MS", 1.0)
    said = []
    found = step.run(plan(say=said.append), ["fastlora"], None)
    paired = found["rows"][1]["over"]
    assert list(paired) == ["fastlora+float"]  # without the kernels there is no non-exact configuration
    assert found["exact_over"] == {"exact over float sums, same kernels": paired["fastlora+float"]["median"]}
    assert said[-1] == f"exact over float sums, same kernels: {paired['fastlora+float']['median']:.3f} x"


def test_the_other_ways_of_a_step_leave_the_model_as_it_was():
    model = build(TINY, "cpu", torch.float32)
    running = systems.adapted(systems.parse("fastlora", tokens=160, rank=4), model, "cpu")

    def sums() -> list[torch.Tensor]:
        running.compute()
        found = [total.total.clone() for _, module in lora_modules(model) for total in module.sums]
        running.clear()
        return found

    before = sums()
    assert list(running.others) == ["fastlora+float"]
    for call in running.others.values():
        call()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, sums(), strict=True))


def test_dropout_is_timed_against_none_on_the_same_model(monkeypatch):
    monkeypatch.setattr("bench.timing.WORK_MS", 1.0)
    rows = step.run(plan(), ["fastlora+dropout"], None)["rows"]
    assert list(rows[1]["over"]) == ["fastlora"]
    without = dict(rows[1], system="fastlora", over={})
    (said,) = tables.derived([rows[0], rows[1], without])
    assert f"dropout 0.1 over none {rows[1]['over']['fastlora']['median']:.3f}" in said

    model = build(TINY, "cpu", torch.float32)
    running = systems.adapted(systems.parse("fastlora+dropout+r8", tokens=160), model, "cpu")
    seen = []
    for _, module in lora_modules(model):
        module.register_forward_pre_hook(lambda module, of: seen.append(module.training))
    (call,) = running.others.values()
    call()
    assert list(running.others) == ["fastlora+r8"] and seen and not any(seen) and model.training


def test_run_stops_at_the_time_limit():
    found = step.run(plan(time_limit=1e-9), ["peft", "fastlora"], None)
    assert ["not_timed" in row for row in found["rows"]] == [False, True, True]


def test_run_does_not_time_what_fails_verification(monkeypatch):
    forward = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x: forward(self, x) * 1.02)
    found = step.run(plan(), ["fastlora"], None)
    assert "fails verification" in found["rows"][1]["not_timed"]


@pytest.mark.parametrize("fault", ["no adapter", "wrong scale", "no dropout"])
def test_check_model_sees_planted_faults(monkeypatch, fault):
    spec = systems.parse("fastlora+dropout", tokens=160, rank=4)
    assert check.model(spec, TINY, "cpu", torch.float32).passed
    ours = check._our_gradients

    def planted(net, *rest):
        for layer in check.lora_layers(net):
            if fault == "no adapter":
                torch.nn.init.zeros_(layer.lora_B.weight)
            elif fault == "wrong scale":
                layer.scaling *= 1.001
            else:
                layer.lora_dropout = 0.0
        return ours(net, *rest)

    monkeypatch.setattr(check, "_our_gradients", planted)
    assert not check.model(spec, TINY, "cpu", torch.float32).passed


def test_check_linear_holds_at_odd_features():
    found = check.linear(33, 17, 3, 0.1, True, "cpu", torch.float32)
    assert found.passed and 0 < found.worst <= 1.0


@pytest.mark.parametrize(
    "name", ["unsloth", "peft+float", "peft+nonexact", "fastlora+compile", "frozen+r16", "peft+align64", "fastlora+fp32", "fastlora+r0", "peft+", "fastlora+nonsense"]
)
def test_parse_refuses_unknown_systems(name):
    with pytest.raises(InputError, match="systems"):
        systems.parse(name)


def test_parse_reads_parts():
    spec = systems.parse("fastlora+ckpt+r128+t2048+cap23+align64")
    assert (spec.rank, spec.tokens, spec.cap_gib, spec.alignment, spec.dropout) == (128, 2048, 23, 64, 0.0)
    assert systems.parse("peft+library").lengths == "library"
    assert systems.parse("fastlora+dropout").dropout == 0.1
    assert systems.parse("fastlora+nonexact").flags == {"nonexact", "float"}


@pytest.mark.parametrize(("name", "kept"), [("peft", torch.bfloat16), ("peft+fp32", torch.float32)])
def test_pefts_adapters_have_the_bases_dtype_or_as_it_makes_them_fp32(name, kept, monkeypatch):
    pytest.importorskip("peft")
    made, add = [], systems.peers.add_peft
    monkeypatch.setattr(systems.peers, "add_peft", lambda *a, **k: made.append(add(*a, **k)) or made[-1])
    running = systems.start(systems.parse(name, tokens=64, rank=4), SHAPES["tiny"], "cpu", torch.bfloat16)
    assert {p.dtype for p in made[0].parameters() if p.requires_grad} == {kept}
    running.step()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_default_systems_are_known(shape):
    names = step.default_systems(shape)
    assert len(set(names)) == len(names)
    assert all(systems.parse(name).name == name for name in names)


def test_shape_named_refuses_unknown_shapes_and_layers():
    with pytest.raises(InputError, match="allowed are llama"):
        shape_named("gpt-9")
    with pytest.raises(InputError, match="1 to 2"):
        shape_named("tiny", 3)
    assert shape_named("llama-3.1-8b", 4).layers == 4
