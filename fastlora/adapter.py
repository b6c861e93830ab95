"""Adapters on disk: PEFT's files, with stable bytes and strict keys.

``adapter_model.safetensors`` holds ``base_model.model.<module path>.lora_A.weight`` [r, K] and
``.lora_B.weight`` [N, r] (of expert weights [E r, K] and [N, r E], see fastlora/experts.py);
``adapter_config.json`` holds PEFT's configuration. Nothing about the run is in either, so two equal
adapters are two equal files and plain ``md5sum`` compares them.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastlora.config import LoraConfig
from fastlora.digest import PREFIX, adapter_tensors
from fastlora.errors import InputError, TrainingError
from fastlora.experts import adapter_paths, factor_shapes
from fastlora.files import atomic_write, atomic_write_text
from fastlora.inject import _inject, injection, lora_layers, require_injection
from fastlora.targets import Targets, resolve_targets

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_COPY = ".base_layer.weight"
_SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's fp32 tensors by PEFT key, sorted; the parameters' own storage, detached.

    Raises:
        InputError: the model has no adapters.
    """
    require_injection(model)
    return dict(sorted(adapter_tensors(model).items()))


def save_adapter(
    model: nn.Module, directory: str | os.PathLike, save_dtype: torch.dtype | str | None = None
) -> pathlib.Path:
    """Write the two files into ``directory`` (made if absent), each whole or not at all; returns
    the directory.

    Equal adapters give equal bytes: tensors sorted, metadata exactly ``{"format": "pt"}`` (the
        safetensors library writes two keys in random order), JSON keys and lists sorted.

    Args:
        model: an injected model, merged or not.
        directory: existing files of the two names are replaced, others left alone.
        save_dtype: None or float32 for the fp32 masters; bfloat16 or float16 (or their names) for
            rounded copies.

    Raises:
        InputError: no adapters; another ``save_dtype``; ``directory`` is a file.
        TrainingError: a value is not finite (in ``save_dtype``); the tensor is named and nothing is
            written.
        OSError: the disk is full or not writable; files that stood there stay whole.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"directory is {str(directory)!r}, which is a file; allowed is a folder")
    write_files(directory, *to_write(model, adapter_state(model), save_dtype))
    return directory


def to_write(
    model: nn.Module, state: dict[str, torch.Tensor], save_dtype: torch.dtype | str | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """What :func:`write_files` takes: the model's configuration, and ``state`` (as :func:`adapter_state` gives it) on the host in the
    dtype asked for.

    Raises:
        InputError, TrainingError: as :func:`save_adapter`.
    """
    record, dtype = require_injection(model), _save_dtype(save_dtype)
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise TrainingError(f"{key} holds values that are not finite in {dtype}; the adapter was not written")
    return record.config, tensors


def write_files(
    directory: pathlib.Path, config: LoraConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the two files of an adapter, each whole or not at all; ``tensors`` on the CPU, by PEFT
    key, sorted."""
    with atomic_write(directory / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    # No sort_keys: to_peft() sorts the fields, while a pattern's own order says which key comes
    # first.
    atomic_write_text(directory / CONFIG_FILE, json.dumps(config.to_peft(), indent=2) + "\n")


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Read an adapter that this library or PEFT wrote into ``model``, in place; returns the model.

    A bare model is injected from the file's configuration. A model with adapters keeps them and
    gets the file's values, provided that paths, ranks and scalings are the file's. 16-bit values
    become fp32 parameters. Everything is checked before the model is touched.

    Raises:
        InputError: no such folder or file; unreadable files; a PEFT feature that is not supported
            (named); a missing or unexpected key or another shape (named); a model with adapters of
            another kind, or merged; a copy of the head's base weight that is not the model's.
    """
    config, tensors = read_adapter(directory)
    tensors, copies = split_copies(tensors)
    _check_copies(directory, model, copies)
    existing = injection(model)
    if existing is None:
        _check_tensors(directory, tensors, _shapes_to_be(resolve_targets(model, config, lenient=True)))
        _inject(model, config, 0, lenient=True)
    else:
        _check_same(directory, model, config)
        shapes = {layer.path: (layer.lora_A.weight.shape, layer.lora_B.weight.shape) for layer in lora_layers(model)}
        _check_tensors(directory, tensors, shapes)
    with torch.no_grad():
        for key, parameter in adapter_state(model).items():
            parameter.copy_(tensors[key])
    return model


def read_adapter(directory: str | os.PathLike) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors (CPU, in the file's dtype, keys as in the file) of an
    adapter's folder.

    Raises:
        InputError: as :func:`load_adapter`, as far as no model is needed.
    """
    directory = pathlib.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            pickled = (directory / "adapter_model.bin").is_file() and name == WEIGHTS_FILE
            hint = (
                " (adapter_model.bin is a pickle and is never loaded: convert it to safetensors)"
                if pickled
                else ""
            )
            raise InputError(f"directory is {str(directory)!r}, which holds no {name}{hint}")
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    config = LoraConfig.from_peft(values, str(path))
    path = directory / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error
    return config, tensors


def split_copies(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(A and B, the rest) of a file's tensors: beside an adapter on the head PEFT saves the head's own
    frozen weight, ``<path>.base_layer.weight``, without being asked."""
    copies = {key: value for key, value in tensors.items() if key.endswith(_COPY)}
    return {key: value for key, value in tensors.items() if key not in copies}, copies


def _check_copies(directory: str | os.PathLike, model: nn.Module, copies: dict[str, torch.Tensor]) -> None:
    """Raise unless every copy of a base weight, rounded to the model's dtype, is that of the model: PEFT would put it there."""
    for key, copy in copies.items():
        path = key.removeprefix(PREFIX).removesuffix(_COPY)
        own = dict(model.named_modules()).get(path)
        weight = getattr(own, "kept_base", None)
        weight = getattr(own, "weight", None) if weight is None else weight
        if weight is None or weight.is_meta:
            continue
        if weight.shape != copy.shape or not torch.equal(copy.to(weight.dtype), weight.detach().cpu()):
            raise InputError(
                f"{pathlib.Path(directory) / WEIGHTS_FILE}: {key} is not the weight of the model's {path}; allowed is the base "
                "model that the adapter was trained on (its head was changed, or this is another model)"
            )


def refuse_experts(config: LoraConfig, reader: str) -> None:
    """For exports of the adapter alone: what ``reader`` has no place for.

    Raises:
        InputError: the adapter is on expert weights.
    """
    if config.target_parameters:
        raise InputError(f"{reader}: the adapter is on expert weights (target_parameters={config.target_parameters!r}), which PEFT's "
                         "file keeps as one block for all experts and other readers do not take; allowed are adapters on linear "
                         "layers (fastlora merge writes a model with the adapter inside)")


def _save_dtype(value: torch.dtype | str | None) -> torch.dtype:
    dtype = torch.float32 if value is None else _SAVE_DTYPES.get(value, value)
    if dtype not in _SAVE_DTYPES.values():
        raise InputError(f"save_dtype is {value!r}, allowed are {', '.join(_SAVE_DTYPES)}")
    return dtype


def _shapes_to_be(targets: Targets) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    """Shapes of A and B by the path that each adapter will have."""
    config = targets.config
    shapes = {}
    for path, module in targets.linear.items():
        rank = config.rank_for(path)
        shapes[path] = (rank, module.in_features), (module.out_features, rank)
    for path, (module, names) in targets.experts.items():
        for name, place in adapter_paths(path, names).items():
            shapes[place] = factor_shapes(module._parameters[name], config.rank_for(f"{path}.{name}"))
    return shapes


def _check_tensors(
    directory: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    shapes: dict[str, tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Raise unless the file holds exactly A and B of the given shapes for every path."""
    file = pathlib.Path(directory) / WEIGHTS_FILE
    wanted = {}
    for path, of_path in shapes.items():
        for name, shape in zip(("lora_A", "lora_B"), of_path):
            wanted[f"{PREFIX}{path}.{name}.weight"] = tuple(shape)
    missing, unexpected = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if missing or unexpected:
        raise InputError(
            f"{file}: does not fit the model and the configuration: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for key, shape in wanted.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise InputError(
                f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}, allowed is a "
                f"floating-point {list(shape)}"
            )


def _check_same(directory: str | os.PathLike, model: nn.Module, config: LoraConfig) -> None:
    for layer in lora_layers(model):
        if layer.merged:
            raise InputError(f"model is merged ({layer.path}); unmerge(model) before load_adapter")
        theirs = (config.rank_for(layer.target), config.scaling_for(layer.target))
        if theirs != (layer.rank, layer.scaling):
            raise InputError(
                f"{pathlib.Path(directory) / CONFIG_FILE}: r and scaling of {layer.path} are "
                f"{theirs[0]} and "
                f"{theirs[1]:g}, but the model's adapter has {layer.rank} and {layer.scaling:g}; "
                "allowed are the same, "
                "or eject(model) first"
            )


def _some(keys: Iterable[str], most: int = 5) -> str:
    keys = list(keys)
    if not keys:
        return "none"
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
