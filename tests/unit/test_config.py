"""LoraConfig: validation names field, value and what is allowed; PEFT's meanings; PEFT's file."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from fastlora.config import LoraConfig
from fastlora.errors import InputError

PATH = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("r", 0, "from 1 to 256"),
        ("r", 257, "from 1 to 256"),
        ("r", True, "from 1 to 256"),
        ("r", 8.0, "from 1 to 256"),
        ("lora_alpha", 0, "above 0"),
        ("lora_alpha", -1, "above 0"),
        ("lora_alpha", math.nan, "above 0"),
        ("lora_dropout", 1.0, "0, or from 2^-16 to 1 - 2^-16"),
        ("lora_dropout", -0.1, "0, or from 2^-16 to 1 - 2^-16"),
        ("lora_dropout", 2**-18, "0, or from 2^-16 to 1 - 2^-16"),
        ("lora_dropout", 1 - 2**-18, "0, or from 2^-16 to 1 - 2^-16"),
        ("lora_dropout", math.nan, "0, or from 2^-16 to 1 - 2^-16"),
        ("use_rslora", 1, "True or False"),
        ("bias", "all", "none"),
        ("modules_to_save", ["lm_head"], "None"),
        ("modules_to_save", ["embed_tokens"], "gradients sum over tokens"),
        ("use_dora", True, "norm of W + s B A"),
        ("init_lora_weights", "pissa", "gaussian"),
        ("init_lora_weights", "pissa_niter_4", "part out of the base weights"),
        ("init_lora_weights", "olora", "part out of the base weights"),
        ("init_lora_weights", None, "gaussian"),
        ("task_type", "CHAT", "CAUSAL_LM"),
        ("target_modules", [], "at least one name"),
        ("target_modules", "", "at least one name"),
        ("target_modules", ["q_proj", "q_proj"], "every name once"),
        ("target_modules", ["q_proj", 3], "list of module names"),
        ("target_modules", "(", "regular expression"),
        ("exclude_modules", "[", "regular expression"),
        ("rank_pattern", {"q_proj": 0}, "from 1 to 256"),
        ("rank_pattern", {"(": 4}, "regular expression"),
        ("rank_pattern", ["q_proj"], "dictionary"),
        ("alpha_pattern", {"q_proj": -2}, "above 0"),
        ("layers_to_transform", [], "layer index"),
        ("layers_to_transform", [0, 0], "layer index"),
        ("layers_to_transform", -1, "layer index"),
        ("layers_pattern", "layers", "layers_to_transform"),
    ],
)
def test_lora_config_refuses_by_field_value_and_allowed(field, value, allowed):
    with pytest.raises(InputError) as caught:
        LoraConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert allowed in message
    shown = value[next(iter(value))] if isinstance(value, dict) and field not in message else value
    assert repr(shown) in message or repr(next(iter(value), value)) in message


def test_lora_config_refuses_layers_beside_one_string():
    with pytest.raises(InputError, match="layers_to_transform is 1"):
        LoraConfig(target_modules=r".*q_proj", layers_to_transform=1)


def test_lora_config_alpha_defaults_to_rank():
    config = LoraConfig(r=12)
    assert config.lora_alpha == 12
    assert config.scaling_for(PATH) == 1.0


def test_lora_config_scaling_follows_rank_and_rslora():
    plain = LoraConfig(r=4, lora_alpha=6)
    rooted = dataclasses.replace(plain, use_rslora=True)
    assert plain.scaling_for(PATH) == 1.5
    assert rooted.scaling_for(PATH) == 3.0


def test_lora_config_patterns_first_match_counts():
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        rank_pattern={r"layers\.3\.self_attn\.q_proj": 8, "q_proj": 2},
        alpha_pattern={"q_proj": 32},
    )
    assert config.rank_for(PATH) == 8
    assert config.rank_for(PATH.replace("3", "4")) == 2
    assert config.rank_for(PATH.replace("q_proj", "k_proj")) == 4
    assert config.rank_for("model.layers.3.self_attn.xq_proj") == 4
    assert config.scaling_for(PATH) == 4.0


def test_lora_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 3
    assert LoraConfig().r == 16


def test_to_peft_is_sorted_and_complete():
    values = LoraConfig(r=4, target_modules={"v_proj", "a", "q_proj"}).to_peft()
    assert list(values) == sorted(values)
    assert values["target_modules"] == ["a", "q_proj", "v_proj"]
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 4, 4)
    assert values["rank_pattern"] == {} and values["alpha_pattern"] == {}
    assert json.loads(json.dumps(values)) == values


def test_from_peft_inverts_to_peft():
    config = LoraConfig(
        r=4,
        lora_alpha=9.5,
        lora_dropout=0.25,
        use_rslora=True,
        target_modules=["q_proj"],
        exclude_modules=r".*\.0\..*",
        rank_pattern={"q_proj": 2},
        layers_to_transform=[1],
        layers_pattern="layers",
    )
    assert LoraConfig.from_peft(config.to_peft()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("something_new", {"a": 1}),
    ],
)
def test_from_peft_refuses_features_by_name(field, value):
    values = LoraConfig(r=4).to_peft() | {field: value}
    if field == "modules_to_save":
        assert values[field]
    with pytest.raises(InputError, match=field):
        LoraConfig.from_peft(values, "file.json")


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_from_peft_needs_the_three_fields(field):
    values = LoraConfig(r=4).to_peft()
    del values[field]
    with pytest.raises(InputError, match=f"{field} is missing"):
        LoraConfig.from_peft(values)


def test_from_peft_refuses_other_methods():
    with pytest.raises(InputError, match="'IA3'"):
        LoraConfig.from_peft(LoraConfig().to_peft() | {"peft_type": "IA3"})


def test_from_peft_takes_null_patterns_and_unset_extras():
    values = LoraConfig(r=4).to_peft()
    values |= {"rank_pattern": None, "alpha_pattern": None, "something_new": None, "eva_config": {}}
    assert LoraConfig.from_peft(values) == LoraConfig(r=4)


def test_from_peft_with_parameters_alone_names_no_module():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    assert LoraConfig.from_peft(config.to_peft()) == config
    assert config.to_peft()["target_parameters"] == ["experts.down", "experts.up"]
    assert LoraConfig.from_peft(config.to_peft() | {"target_modules": None}) == config
    assert "target_parameters" not in LoraConfig(r=2).to_peft()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ".*experts.*"}, "target_parameters is '.*experts.*', allowed is None or a list of names"),
        ({"target_parameters": ["a", 3]}, "allowed is a list of parameter names"),
        ({"target_parameters": ["a", "a"]}, "every name once"),
        ({"target_parameters": ["a"], "lora_dropout": 0.1}, "lora_dropout is 0.1, allowed is 0 beside target_parameters .PEFT adds"),
        ({"target_parameters": [], "target_modules": []}, "target_modules is .., allowed is None, at least one name"),
    ],
)
def test_lora_config_refuses_parameters_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)
