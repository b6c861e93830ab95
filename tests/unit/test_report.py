"""The update report: figures of each row, the sentences, and the forms a state may have."""

from __future__ import annotations

import io
import json
import math
import pathlib

import pytest
import torch
from lora_standin import StandInModel
from rich.console import Console
from safetensors.torch import save_file

from fastlora.digest import digest, frozen_fingerprint, tensor_md5
from fastlora.errors import InputError
from fastlora.exact import exact
from fastlora.optim import AdamW
from fastlora.report import UpdateReport, snapshot, update_report

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))


def trained(steps: int, model: StandInModel | None = None, loss_scale: float = 1.0) -> tuple:
    model = StandInModel() if model is None else model
    before = snapshot(model)
    optimizer = AdamW(model)
    for _ in range(steps):
        with exact(model):
            (model(X) * loss_scale).sum().backward()
        optimizer.step(supervised_tokens=8)
    return model, before, optimizer


def says(report: UpdateReport, text: str) -> bool:
    return any(text in sentence for sentence in report.findings)


def test_row_figures_are_those_of_the_tensors() -> None:
    old = {"m.lora_A.weight": torch.tensor([[1.0, 2.0, -3.0, 0.0]])}
    new = {"m.lora_A.weight": torch.tensor([[1.0, 2.5, -3.25, -0.0]])}
    row = update_report(old, new).rows[0]
    assert (row.name, row.sum_abs_diff, row.max_abs_diff) == ("m.lora_A.weight", 0.75, 0.5)
    assert row.changed == 0.75  # the sign of a zero is a change of bits
    assert row.norm == math.sqrt(1 + 2.5**2 + 3.25**2)
    assert (row.md5_before, row.md5_after) == tuple(tensor_md5(d["m.lora_A.weight"]) for d in (old, new))
    assert not row.equal and not row.zero and row.finite and row.underflow is None


def test_report_after_many_steps_says_that_all_changed() -> None:
    model, before, optimizer = trained(3)
    report = update_report(before, model, steps=3, underflow=optimizer.underflow_shares())
    assert says(report, "All 4 adapter tensors changed.")
    assert says(report, "The frozen weights are as they were")
    assert len(report.findings) == 2
    assert report.digest_after == digest(model) != report.digest_before
    assert report.frozen_before == report.frozen_after == frozen_fingerprint(model)
    assert [r.name for r in report.rows] == sorted(r.name for r in report.rows)
    assert all(r.underflow == 0 for r in report.rows)


@pytest.mark.parametrize(
    "steps, when", [(1, "that is right after one step"), (None, "if only one step was taken")]
)
def test_first_step_from_zero_b_rightly_leaves_a(steps: int | None, when: str) -> None:
    model, before, _ = trained(1)
    report = update_report(before, model, steps=steps)
    assert [r.equal for r in report.rows] == [True, False, True, False]
    assert says(report, when)
    assert says(report, "2 of 4 adapter tensors changed")
    assert not says(report, "lost")


def test_a_unchanged_after_many_steps_is_a_fault() -> None:
    model, before, _ = trained(1)
    report = update_report(before, model, steps=84000)
    assert says(report, "the exact start values after 84000 steps although B moved")


def test_unreached_modules_are_named_once() -> None:
    model, before, _ = trained(2)
    model.v_proj.lora_A.weight.data.copy_(before.tensors["base_model.model.v_proj.lora_A.weight"])
    model.v_proj.lora_B.weight.data.zero_()
    report = update_report(before, model, steps=2)
    assert says(report, "v_proj.lora_B.weight has only zeros still")
    assert sum("v_proj" in sentence for sentence in report.findings) == 1
    assert [r.zero for r in report.rows] == [False, False, False, True]


def test_a_unchanged_beside_a_nonzero_b_was_not_reached() -> None:
    model, before, _ = trained(2, StandInModel().fill_b())
    model.q_proj.lora_A.weight.data.copy_(before.tensors["base_model.model.q_proj.lora_A.weight"])
    report = update_report(before, model, steps=2)
    assert says(report, "q_proj.lora_A.weight has still the exact start values: training did not reach")


@pytest.mark.parametrize("steps, text", [(0, "no step was taken"), (5, "loss does not reach the adapter")])
def test_nothing_changed_is_said(steps: int, text: str) -> None:
    model = StandInModel()
    report = update_report(model, snapshot(model), steps=steps)
    assert says(report, "None of the 4 adapter tensors changed")
    assert says(report, text)


def test_changed_frozen_weights_are_said() -> None:
    model, before, _ = trained(2)
    model.norm.weight.data[0] += 1
    report = update_report(before, model)
    assert says(report, "The frozen weights CHANGED")
    assert report.frozen_before != report.frozen_after


def test_non_finite_values_come_first_and_stay_json() -> None:
    model, before, _ = trained(2)
    model.q_proj.lora_A.weight.data[0, 0] = float("nan")
    report = update_report(before, model)
    assert report.findings[0].startswith("q_proj.lora_A.weight has NaN or infinite values")
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(text)["tensors"][0]["sum_abs_diff"] == "nan"


def test_small_gradients_name_gradient_scale() -> None:
    model, before, optimizer = trained(2, loss_scale=1e-12)
    report = update_report(before, model, underflow=optimizer.underflow_shares())
    assert says(report, "raise gradient_scale")


def test_few_changed_elements_are_said() -> None:
    old = {"m.lora_B.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    new = {"m.lora_B.weight": old["m.lora_B.weight"].clone()}
    new["m.lora_B.weight"][0] = 2
    report = update_report(old, new)
    assert report.rows[0].changed == 0.25
    assert says(report, "changes in under 50% of the elements")


def test_states_may_be_folders_dicts_and_models(tmp_path: pathlib.Path) -> None:
    model, before, _ = trained(2)
    for name, tensors in (("old", before.tensors), ("new", snapshot(model).tensors)):
        (tmp_path / name).mkdir()
        save_file(dict(tensors), tmp_path / name / "adapter_model.safetensors")
    want = update_report(before, model)
    for pair in ((tmp_path / "old", str(tmp_path / "new")), (before.tensors, model)):
        report = update_report(*pair)
        assert report.rows == want.rows
        assert (report.digest_before, report.digest_after) == (want.digest_before, want.digest_after)
        assert says(report, "frozen weights were not compared")


def test_bad_states_are_refused(tmp_path: pathlib.Path) -> None:
    x = {"m.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match="before: got .*adapter_model.safetensors"):
        update_report(tmp_path, x)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        update_report(tmp_path, x)
    with pytest.raises(InputError, match="different tensors"):
        update_report(x, {**x, "n.lora_A.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"m\.lora_A\.weight: got torch\.float32 \(2, 3\)"):
        update_report(x, {"m.lora_A.weight": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="no adapter tensor"):
        update_report({}, {})


def test_snapshot_is_a_copy() -> None:
    model = StandInModel()
    before = snapshot(model)
    model.fill_b()
    assert not before.tensors["base_model.model.q_proj.lora_B.weight"].any()


def test_table_has_a_row_per_tensor_and_explains_itself() -> None:
    model, before, _ = trained(1)
    report = update_report(before, model, steps=1)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for row in report.rows:
        assert row.name.removesuffix(".weight") in text  # whole in 80 columns
        assert row.md5_after[:8] in text
    assert text.count("none") == 2  # both A, at the first step
    assert "share of elements" in text.replace("\n", " ")
