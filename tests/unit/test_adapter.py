"""save_adapter and load_adapter: stable bytes, strict keys, PEFT's layout."""

from __future__ import annotations

import hashlib
import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_state, load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.errors import InputError, TrainingError
from fastlora.inject import eject, inject, injection, lora_layers
from fastlora.merge import merge
from tests.models import tiny_model, tokens

CONFIG = LoraConfig(
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules=["v_proj", "q_proj", "down_proj"],
    rank_pattern={"down_proj": 3},
    init_lora_weights=False,
)


def md5(directory: pathlib.Path) -> list[str]:
    return [
        hashlib.md5((directory / name).read_bytes()).hexdigest()
        for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]


@pytest.fixture
def saved(tmp_path):
    model = inject(tiny_model(), CONFIG, seed=3)
    return model, save_adapter(model, tmp_path / "adapter")


def edit(directory: pathlib.Path, **values) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_save_adapter_writes_the_same_bytes_twice(saved, tmp_path):
    model, directory = saved
    again = inject(tiny_model(), CONFIG, seed=3)
    assert md5(save_adapter(again, tmp_path / "again")) == md5(directory)
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    with torch.no_grad():
        next(lora_layers(again)).lora_A.weight[0, 0] += 1
    assert md5(save_adapter(again, tmp_path / "again"))[1] != md5(directory)[1]


def test_save_adapter_layout_is_pefts(saved):
    model, directory = saved
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert set(keys) == {
        f"base_model.model.{layer.path}.{name}.weight"
        for layer in lora_layers(model)
        for name in ("lora_A", "lora_B")
    }
    header = (directory / WEIGHTS_FILE).read_bytes()
    names = list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))
    assert [name for name in names if name != "__metadata__"] == sorted(keys)
    values = json.loads((directory / CONFIG_FILE).read_text())
    assert list(values) == sorted(values)
    assert values["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 4, 6)
    assert (values["rank_pattern"], values["alpha_pattern"]) == ({"down_proj": 3}, {})


def test_save_adapter_names_default_targets(tmp_path):
    directory = save_adapter(inject(tiny_model("phi3"), LoraConfig(r=2)), tmp_path)
    values = json.loads((directory / CONFIG_FILE).read_text())
    assert values["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_load_adapter_injects_a_bare_model_with_the_same_bits(saved):
    model, directory = saved
    bare = tiny_model()
    assert load_adapter(bare, directory) is bare
    mine, theirs = adapter_state(model), adapter_state(bare)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [layer.scaling for layer in lora_layers(model)] == [
        layer.scaling for layer in lora_layers(bare)
    ]
    assert torch.equal(model(tokens()).logits, bare(tokens()).logits)


def test_load_adapter_fills_the_adapters_a_model_has(saved):
    model, directory = saved
    other = inject(tiny_model(), CONFIG, seed=4)
    parameters = {name: id(p) for name, p in other.named_parameters()}
    load_adapter(other, directory)
    assert all(
        torch.equal(value, adapter_state(model)[key]) for key, value in adapter_state(other).items()
    )
    assert {name: id(p) for name, p in other.named_parameters()} == parameters


def test_load_adapter_refuses_adapters_of_another_kind(saved):
    _, directory = saved
    with pytest.raises(InputError, match="r and scaling of .* but the model's adapter has 2"):
        load_adapter(inject(tiny_model(), LoraConfig(r=2)), directory)
    with pytest.raises(InputError, match="missing .*up_proj"):
        targets = ["q_proj", "v_proj", "down_proj", "up_proj"]
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=targets,
            rank_pattern={"down_proj": 3},
        )
        load_adapter(inject(tiny_model(), config), directory)
    with pytest.raises(InputError, match="merged"):
        load_adapter(merge(inject(tiny_model(), CONFIG)), directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_save_adapter_dtype_rounds_once_and_loads_as_fp32(saved, tmp_path, dtype):
    model, _ = saved
    directory = save_adapter(model, tmp_path / "small", save_dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {tensor.dtype for tensor in load_file(directory / WEIGHTS_FILE).values()} == {wanted}
    state = adapter_state(load_adapter(tiny_model(), directory))
    for key, value in adapter_state(model).items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], value.to(wanted).float())


def test_save_adapter_refuses_other_dtypes_files_and_bare_models(saved, tmp_path):
    model, _ = saved
    with pytest.raises(
        InputError, match="save_dtype is 'int8', allowed are float32, bfloat16, float16"
    ):
        save_adapter(model, tmp_path / "x", save_dtype="int8")
    with pytest.raises(InputError, match="no adapters"):
        save_adapter(tiny_model(), tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        save_adapter(model, tmp_path / "file")
    assert not (tmp_path / "x").exists()


def test_save_adapter_keeps_the_old_file_when_values_are_not_finite(saved):
    model, directory = saved
    before = md5(directory)
    with torch.no_grad():
        next(lora_layers(model)).lora_B.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="lora_B.weight holds values that are not finite"):
        save_adapter(model, directory)
    assert md5(directory) == before


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_load_adapter_is_strict_and_leaves_the_model_bare(saved, change):
    _, directory = saved
    tensors = load_file(directory / WEIGHTS_FILE)
    key = sorted(tensors)[0]
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        key = key.replace("down_proj", "up_proj")
        tensors[key] = torch.zeros(3, 32)
    else:
        tensors[key] = tensors[key][:, 1:].contiguous()
    save_file(tensors, directory / WEIGHTS_FILE)
    model = tiny_model()
    with pytest.raises(InputError) as caught:
        load_adapter(model, directory)
    assert key in str(caught.value)
    assert injection(model) is None and not list(lora_layers(model))


@pytest.mark.parametrize(
    "field",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}],
)
def test_load_adapter_refuses_features_by_name(saved, field):
    _, directory = saved
    edit(directory, **field)
    with pytest.raises(InputError, match=next(iter(field))):
        load_adapter(tiny_model(), directory)


def test_load_adapter_refuses_what_is_no_adapter(saved, tmp_path):
    _, directory = saved
    with pytest.raises(InputError, match=f"holds no {CONFIG_FILE}"):
        load_adapter(tiny_model(), tmp_path / "nowhere")
    (directory / CONFIG_FILE).write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_adapter(tiny_model(), directory)
    (directory / CONFIG_FILE).write_text("[]")
    with pytest.raises(InputError, match="one JSON object"):
        load_adapter(tiny_model(), directory)


def test_load_adapter_refuses_broken_and_pickled_weights(saved):
    _, directory = saved
    (directory / WEIGHTS_FILE).write_bytes(b"no such format")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_adapter(tiny_model(), directory)
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle and is never loaded"):
        load_adapter(tiny_model(), directory)


def test_load_adapter_then_eject_leaves_the_base(saved):
    _, directory = saved
    model = tiny_model()
    before = model(tokens()).logits
    load_adapter(model, directory)
    assert not torch.equal(model(tokens()).logits, before)
    assert torch.equal(eject(model)(tokens()).logits, before)
