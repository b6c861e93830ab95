"""LoraConfig: PEFT's field names and meanings, every field validated with an error that names
it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastlora import dropout_rate
from fastlora.errors import InputError

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 256
_TASKS = (
    None,
    "CAUSAL_LM",
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

# Why what users ask for most is not done; said wherever it is refused.
_WHY = {
    "modules_to_save": "trained copies of whole modules: their gradients sum over tokens, and the exact sums and the "
    "fused layers know A and B alone; train the adapter, or all weights with another tool",
    "dropout": "PEFT adds s B A to the experts' weights, where there is no input to drop, and refuses it too",
    "use_dora": "DoRA: its norm of W + s B A would have to be taken again at every step, and its magnitudes need "
    "sums over tokens that the exact sums do not have; rsLoRA at a higher rank is what there is",
    "pissa": "PiSSA, OLoRA and their kin take a part out of the base weights: the adapter file alone would then "
    "stand for another model than PEFT reads it as, and a 16-bit base would be rounded a second time",
}
# Fields of PEFT's file that ask for something this library does not do, with the values that ask
# for nothing.
_REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA, which changes the base weights",
    "fan_in_fan_out": "transposed weights (Conv1D layers)",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "loftq_config": "LoftQ, which changes the base weights",
    "lora_bias": "a bias on lora_B",
    "lora_ga_config": "LoRA-GA, which changes the base weights",
    "megatron_config": "Megatron layers",
    "modules_to_save": _WHY["modules_to_save"],
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": _WHY["use_dora"],
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
# Fields that change nothing about a finished adapter: bookkeeping, or settings of a feature refused
# above.
_IGNORED = frozenset(
    {
        "auto_mapping",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)
# What may stand in PEFT's file beside the fields of LoraConfig.
KNOWN_TO_PEFT = frozenset(_REFUSED) | _IGNORED
# Initialisations that change the base weights; PEFT adds "_niter_N" to the first for a faster decomposition.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Initialisations that leave the base weights alone: the file's tensors replace whatever they drew.
_INIT_OF_FILE_ONLY = frozenset({"eva", "orthogonal"})


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how: s = lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)).

    Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA); names and meanings are PEFT's.

    Attributes:
        r: rank, 1 to 256.
        lora_alpha: positive number; None (the default) means ``r``, so that s = 1.
        lora_dropout: probability of leaving an input feature out of the adapter's path: 0, or from
            2^-16 to 1 - 2^-16; it is rounded to a multiple of 2^-16.
        use_rslora: scale by 1 / sqrt(r) instead of 1 / r.
        target_modules: None (the model family's projections: for most the seven), a list of module
            names or path endings, one regular expression that must match a whole path, or
            ``"all-linear"`` (without the output head). ``lm_head`` has to be named and not tied.
        exclude_modules: a list of names or path endings, or one regular expression; wins over
            targets.
        bias: ``"none"``; other values are refused.
        rank_pattern, alpha_pattern: path ending or regular expression -> rank, alpha of those
            modules. The first key that matches counts.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with std 1/r,
            B zero) or False (A and B both drawn, the adapter acts from the start). PiSSA and others
            that change the base weights are refused.
        layers_to_transform, layers_pattern: only these layer indices, as in PEFT; with a list of
            targets only.
        task_type, base_model_name_or_path, revision: carried into the file, used by nothing here.
        modules_to_save, use_dora: None and False; anything else is refused, with the reason.
        target_parameters: None, or names or path endings of parameters that hold all experts of a
            mixture (``"mlp.experts.gate_up_proj"``): every expert gets an A and a B of rank ``r``.
            ``target_modules`` may then be empty (None still means the family's projections);
            ``lora_dropout`` must be 0. Keys of ``rank_pattern`` match the parameter's path.

    Raises:
        InputError: a field has a value that is not allowed; the message names field, value and what
            is allowed.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    modules_to_save: None = None
    use_dora: bool = False
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        p = self.lora_dropout
        if not _is_number(p) or not dropout_rate.allowed(p):
            raise _wrong("lora_dropout", p, "a probability: 0, or from 2^-16 to 1 - 2^-16")
        _check_bool("use_rslora", self.use_rslora)
        if self.bias != "none":
            raise _wrong("bias", self.bias, '"none" (trained biases are not supported)')
        if self.modules_to_save is not None:
            raise _wrong(
                "modules_to_save",
                self.modules_to_save,
                f"None ({_WHY['modules_to_save']})",
            )
        if self.use_dora is not False:
            raise _wrong("use_dora", self.use_dora, f"False ({_WHY['use_dora']})")
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise _wrong("init_lora_weights", init, f'True, False or "gaussian" ({_WHY["pissa"]})')
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise _wrong("init_lora_weights", self.init_lora_weights, 'True, False or "gaussian"')
        if self.task_type not in _TASKS:
            raise _wrong("task_type", self.task_type, f"one of {', '.join(map(repr, _TASKS))}")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names_or_regex(name, getattr(self, name)))
        self._check_parameters()
        if self.target_modules is not None and not self.target_modules and not self.target_parameters:
            raise _wrong(
                "target_modules",
                self.target_modules,
                "None, at least one name, or a regular expression (an empty list beside "
                "target_parameters alone)",
            )
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            object.__setattr__(self, name, _pattern(name, getattr(self, name), check))
        self._check_layers()

    def _check_parameters(self) -> None:
        names = self.target_parameters
        if isinstance(names, str):
            raise _wrong("target_parameters", names, "None or a list of names (no regular expression, as in PEFT)")
        names = _names_or_regex("target_parameters", names) or None
        object.__setattr__(self, "target_parameters", names)
        if names and self.lora_dropout:
            raise _wrong("lora_dropout", self.lora_dropout, f"0 beside target_parameters ({_WHY['dropout']})")

    def _check_layers(self) -> None:
        allowed = "None, a layer index (0 or more), or a list of different ones"
        layers = self.layers_to_transform
        if layers is not None:
            many = [layers] if _is_int(layers) else layers
            if (
                not isinstance(many, (list, tuple))
                or not many
                or not all(_is_int(i) and i >= 0 for i in many)
                or len(set(many)) != len(many)
            ):
                raise _wrong("layers_to_transform", layers, allowed)
            object.__setattr__(
                self, "layers_to_transform", layers if _is_int(layers) else list(many)
            )
            if isinstance(self.target_modules, str):
                raise _wrong(
                    "layers_to_transform",
                    layers,
                    "None when target_modules is one string, as in PEFT",
                )
        pattern = self.layers_pattern
        if pattern:
            patterns = [pattern] if isinstance(pattern, str) else pattern
            if not isinstance(patterns, (list, tuple)) or not all(
                isinstance(p, str) for p in patterns
            ):
                raise _wrong("layers_pattern", pattern, "None, a name or a list of names")
            for one in patterns:
                _check_regex("layers_pattern", one)
            if layers is None:
                raise _wrong(
                    "layers_pattern", pattern, "None while layers_to_transform is not given"
                )

    def rank_for(self, path: str) -> int:
        """The rank of the module at ``path``: the first matching key of ``rank_pattern``, else
        ``r``."""
        return _lookup(self.rank_pattern, path, self.r)

    def alpha_for(self, path: str) -> float:
        """The alpha of the module at ``path``: the first matching key of ``alpha_pattern``, else
        ``lora_alpha``."""
        return _lookup(self.alpha_pattern, path, self.lora_alpha)

    def scaling_for(self, path: str) -> float:
        """The factor s of the module at ``path``, computed in float64 as PEFT does."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_peft(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``: only JSON values, lists sorted, patterns never
        null.

        The keys inside a pattern keep their order, because the first that matches counts;
        ``inject`` sorts them where the order makes no difference.
        """
        result = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if isinstance(result[name], (list, tuple)):
                result[name] = sorted(result[name])
        if self.target_parameters is None:  # unknown to PEFT before 0.17
            del result["target_parameters"]
        result.update(rank_pattern=dict(self.rank_pattern), alpha_pattern=dict(self.alpha_pattern))
        result.update(peft_type="LORA", inference_mode=True, fan_in_fan_out=False)
        return dict(sorted(result.items()))

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], source: str = "adapter_config.json"
    ) -> LoraConfig:
        """Read the content of PEFT's ``adapter_config.json``.

        Raises:
            InputError: the file is no LoRA adapter's, lacks ``peft_type``, ``r`` or ``lora_alpha``,
                or asks for a feature that is not supported (DoRA, biases, modules_to_save, ...);
                the message names it.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: holds {type(values).__name__}, allowed is one JSON object")
        for name in ("peft_type", "r", "lora_alpha"):
            if values.get(name) is None:
                raise InputError(
                    f"{source}: field {name} is missing; every PEFT LoRA adapter has it"
                )
        if values["peft_type"] != "LORA":
            raise InputError(f"{source}: peft_type is {values['peft_type']!r}, allowed is 'LORA'")
        own = {item.name for item in fields(cls)}
        kept: dict[str, Any] = {}
        for name in sorted(values):
            value = values[name]
            if name in _REFUSED:
                if value not in (None, False, {}, []):
                    raise InputError(
                        f"{source}: {name} is {value!r}: {_REFUSED[name]} is not supported"
                    )
            elif name in own:
                kept[name] = value
            elif name not in _IGNORED and value not in (None, False, {}, []):
                raise InputError(
                    f"{source}: unknown field {name} is {value!r}; it may change what the adapter "
                    "computes"
                )
        for name in ("rank_pattern", "alpha_pattern"):
            kept[name] = kept.get(name) or {}
        kept["modules_to_save"] = None
        if kept.get("target_parameters") and kept.get("target_modules") is None:
            kept["target_modules"] = []  # PEFT writes what it adapted: with no module named, none was
        kept["bias"] = kept.get("bias") or "none"
        if kept.get("init_lora_weights") in _INIT_OF_FILE_ONLY:
            kept["init_lora_weights"] = True
        try:
            return cls(**kept)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def names_match(names: list[str] | str, path: str) -> bool:
    """PEFT's rule: one string is a regular expression for the whole path; names equal the path or
    end it."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _lookup(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    # PEFT's get_pattern_key: the first key k for which (.*\.)?(k)$ matches from the start of the
    # path.
    for key, value in patterns.items():
        if pattern_matches(key, path):
            return value
    # PEFT then looks the path itself up, which a key with special characters can equal without
    # matching.
    return patterns.get(path, default)


def pattern_matches(key: str, path: str) -> bool:
    """PEFT's rule for a key of ``rank_pattern`` and ``alpha_pattern``."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _wrong(name: str, value: Any, allowed: str) -> InputError:
    return InputError(f"{name} is {value!r}, allowed is {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")


def _check_rank(name: str, value: Any) -> None:
    if not _is_int(value) or not 1 <= value <= MAX_RANK:
        raise _wrong(name, value, f"an integer from 1 to {MAX_RANK}")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise _wrong(name, value, "a finite number above 0")


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise _wrong(name, value, f"a valid regular expression ({error})") from error


def _names_or_regex(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if name == "target_modules" and value.lower() == "all-linear":
            return "all-linear"
        _check_regex(name, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(v, str) and v for v in value
    ):
        allowed = "parameter names" if name == "target_parameters" else "module names, or one regular expression"
        raise _wrong(name, value, f"a list of {allowed}")
    if len(set(value)) != len(value):
        twice = sorted({v for v in value if list(value).count(v) > 1})
        raise _wrong(name, list(value), f"every name once ({', '.join(twice)} stands there twice)")
    return sorted(value)


def _pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise _wrong(name, value, "a dictionary from module name or regular expression to number")
    for key, number in value.items():
        _check_regex(name, key)
        check(f"{name}[{key!r}]", number)
    return dict(value)
