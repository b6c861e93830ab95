"""The merge certificate: what it says about the written files is true, and it can fail."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastlora import certificate
from fastlora.adapter import load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.digest import digest, frozen_tensors
from fastlora.errors import InputError, TrainingError
from fastlora.export import merge_to_folder
from fastlora.inject import inject, lora_layers
from fastlora.merge import merge
from tests.models import EXPERTS, ON_EXPERTS
from tests.models import tiny_model as small
from tests.unit.tiny_run import run_command, save_model, tiny_model
from tests.unit.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base in bf16 and an adapter whose B is not 0."""
    folder = tmp_path_factory.mktemp("merge")
    save_model(folder / "base")
    tiny_model().bfloat16().save_pretrained(folder / "base")
    model = inject(tiny_model(), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False), seed=1)
    save_adapter(model, folder / "adapter")
    return folder


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_merge_to_folder_certifies_what_it_wrote(place, tmp_path, dtype):
    folder, found = merge_to_folder(place / "base", place / "adapter", tmp_path / "merged", dtype=dtype, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=wanted)
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(place / "base", dtype=wanted), place / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert next(merged.parameters()).dtype == wanted
    assert found.digests == {"base": digest(frozen_tensors(base)), "adapter": digest(adapted),
                             "merged": digest(frozen_tensors(merged))}
    assert found.digests["base"] != found.digests["merged"]
    layers = {f"{layer.path}.weight": layer for layer in lora_layers(adapted)}
    assert [row.name for row in found.tensors] == list(layers)
    for row in found.tensors:
        layer = layers[row.name]
        delta = layer.scaling * layer.lora_B.weight.detach().double() @ layer.lora_A.weight.detach().double()
        written = merged.get_parameter(row.name).detach().double()
        error = (written - (layer.weight.detach().double() + delta)).abs()
        # The float64 sums differ in their last bits alone.
        assert abs(row.error - float(error.max())) <= 2.0**-44
        assert abs(row.adapter - float(delta.abs().max())) <= 2.0**-44
        assert 0 < row.error <= row.bound and 0 < row.of_bound <= 1
        assert row.lost == pytest.approx(float(error.norm() / delta.norm()))  # tolerance-rule: the same float64 sum, regrouped
    ids = certificate.probe_ids(_tokenizer(place), found.logits.text)
    with torch.no_grad():
        gap = (adapted(ids).logits.double() - merged(ids).logits.double()).abs().max()
    assert found.logits.largest == float(gap) > 0
    assert found.logits.tokens == ids.shape[1]
    assert json.loads((folder / certificate.FILE).read_text())["digests"] == found.digests
    for name, sha256 in found.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    assert any("float32" in line for line in found.lines()[2:]) == (dtype != "float32")


def _tokenizer(place):
    from fastlora.setup import load_tokenizer

    return load_tokenizer(str(place / "base"))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [*((name, {}) for name in ("phi3", "gemma3_text", "qwen3_moe", "mixtral")), *((name, ON_EXPERTS) for name in EXPERTS)],
)
def test_merge_to_folder_of_families_with_names_of_their_own(model_type, fields, tmp_path):
    """Fused projections, two kinds of layers, experts that transformers stores under other names than it computes with."""
    model = small(model_type, vocab_size=330, **EXPERTS.get(model_type, {}))
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoraConfig(r=2, init_lora_weights=False, **fields)), tmp_path / "adapter")
    folder, found = merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert [row.name for row in found.tensors] == [layer.weight_name for layer in lora_layers(model)]
    assert all(0 < row.error <= row.bound < row.adapter for row in found.tensors)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert digest(frozen_tensors(again)) == found.digests["merged"] != found.digests["base"]


def test_merge_to_folder_loses_less_in_fp32(place, tmp_path):
    lost = {}
    for dtype in ("bfloat16", "float32"):
        _, found = merge_to_folder(place / "base", place / "adapter", tmp_path / dtype, dtype=dtype)
        lost[dtype] = max(row.lost for row in found.tensors)
    assert lost["float32"] < 2.0**-12 * lost["bfloat16"]


def test_tensor_roundings_finds_a_weight_that_was_written_wrong(place, tmp_path):
    model = merge(load_adapter(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16), place / "adapter"))
    layers = list(lora_layers(model))
    name = f"{layers[3].path}.weight"
    tensors = {f"{layer.path}.weight": layer.weight.detach().clone() for layer in layers}
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(certificate.tensor_roundings(layers, tmp_path)) == len(layers)
    row = tensors[name][5]
    # two units in the last place of one element
    row[7] *= 1 + 2 * torch.finfo(torch.bfloat16).eps
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match=f"{name} was written"):
        certificate.tensor_roundings(layers, tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match=f"{name} is not among"):
        certificate.tensor_roundings(layers, tmp_path)


def test_merge_to_folder_leaves_nothing_behind_when_it_fails(place, tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "file_hashes", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_to_folder(place / "base", place / "adapter", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_merge_to_folder_refuses_a_probe_of_one_token(place, tmp_path):
    with pytest.raises(InputError, match="probe_text = ''"):
        merge_to_folder(place / "base", place / "adapter", tmp_path / "merged", probe_text="")


def test_merge_command_prints_the_certificate(place, tmp_path, capsys):
    capsys.readouterr()
    code, out, err = run_command(capsys, "merge", "--model", place / "base", "--adapter", place / "adapter",
                               "--output", tmp_path / "merged")
    assert code == 0 and err == ""
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    (tmp_path / "ordinary").touch()
    assert modes == {(tmp_path / "ordinary").stat().st_mode & 0o777}
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for word in ("Rounding of the merge", "down_proj", "logits on", "--dtype float32", certificate.FILE):
        assert word in out, word
    assert "model.layers.0.mlp.down_proj.weight" in written
