"""Put adapters into a model in place, and take them out again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.callable_module import make_callable
from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.experts import ExpertLora, LoraExperts
from fastlora.modules import LoraLinear
from fastlora.targets import resolve_targets

_RECORD = "_fastlora"


@dataclass(frozen=True)
class Injection:
    """What :func:`inject` did: the configuration with its targets by name, the seed, and what was
    trainable."""

    config: LoraConfig
    seed: int
    trainable: tuple[str, ...]


def inject(
    model: nn.Module, config: LoraConfig | None = None, *, seed: int | None = None
) -> nn.Module:
    """Replace every targeted linear layer of ``model`` by a :class:`LoraLinear` and every module with
    targeted expert weights by a :class:`LoraExperts`, in place, and return the model.

    Names, objects and bytes of all base parameters stay; they stop requiring gradients (``eject``
    gives that back), and the adapters' fp32 parameters are the only trainable ones. Each A is drawn
    from a generator of its own, seeded by ``seed`` (None: ``torch.initial_seed()``) and the
    module's path, so neither the order of injection nor other targets change it, and torch's global
    generator is left alone.

    Reentrant gradient checkpointing needs an input with a gradient, which frozen embeddings no
    longer give: call ``model.enable_input_require_grads()`` first (the non-reentrant kind needs
    nothing).

    Args:
        model: any torch model; transformers models need no more than this.
        config: None means ``LoraConfig()``.
        seed: an integer; the same seed, path and shape give the same A.

    Raises:
        InputError: the model has adapters already; a target matches nothing, twice, or no plain
            linear layer (no expert weights that are known); its weight is shared (as a tied output
            head's is); near misses are listed. The model is then unchanged.
    """
    config = LoraConfig() if config is None else config
    return _inject(model, config, seed, lenient=False)


def _inject(model: nn.Module, config: LoraConfig, seed: int | None, *, lenient: bool) -> nn.Module:
    if not isinstance(config, LoraConfig):
        raise InputError(f"config is {type(config).__name__}, allowed is fastlora.LoraConfig")
    seed = torch.initial_seed() if seed is None else int(seed)
    if injection(model) is not None or next(lora_layers(model), None) is not None:
        raise InputError(
            "model has adapters already; eject(model) first, or load_adapter into the ones it has"
        )
    linear, experts, config = resolve_targets(model, config, lenient=lenient)
    trainable = tuple(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, base in linear.items():
        layer = LoraLinear(
            base, path, config.rank_for(path), config.scaling_for(path), config.lora_dropout
        )
        _replace(model, path, layer)
    for path, (base, names) in experts.items():
        places = {name: f"{path}.{name}" for name in names}
        adapted = {n: (config.rank_for(place), config.scaling_for(place)) for n, place in places.items()}
        _replace(model, path, LoraExperts(base, path, adapted))
    for layer in lora_layers(model):
        if not layer.lora_A.weight.is_meta:
            layer.reset(config.init_lora_weights, _generator(seed, layer.target))
    setattr(model, _RECORD, Injection(config, seed, trainable))
    return model


def eject(model: nn.Module, *, keep_merged: bool = False) -> nn.Module:
    """Undo :func:`inject`: the original modules come back, with the same bytes and the same
    ``requires_grad``.

    Args:
        model: an injected model; returned.
        keep_merged: leave merged weights merged (a plain model with the adapter inside) instead of
            restoring the base from the copy that ``merge`` kept.

    Raises:
        InputError: the model has no adapters, or is merged without a kept copy and ``keep_merged``
            is False.
    """
    record = require_injection(model)
    layers = list(lora_layers(model))
    if any(layer.merged for layer in layers) and not keep_merged:
        from fastlora.merge import unmerge

        unmerge(model)
    owner = record_owner(model)
    for layer in layers:
        if not hasattr(layer, "_base"):  # inside a LoraExperts
            continue
        (base,) = layer._base
        # model.to() may have put new parameter objects into the layer: the base follows.
        for name in list(base._parameters):
            base.register_parameter(name, getattr(layer, name))
        base.train(layer.training)
        _replace(owner, layer.path, base)
    trainable = set(record.trainable)
    for name, parameter in owner.named_parameters():
        parameter.requires_grad_(name in trainable)
    delattr(owner, _RECORD)
    return model


def lora_layers(model: nn.Module) -> Iterator[LoraLinear | ExpertLora]:
    """Every adapter of the model, one for each adapted weight, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, (LoraLinear, ExpertLora)))


def record_owner(model: nn.Module) -> nn.Module | None:
    """The module that :func:`inject` was called on: ``model``, or one inside it (wrapped by DDP,
    torch.compile)."""
    return next((module for module in model.modules() if _RECORD in vars(module)), None)


def injection(model: nn.Module) -> Injection | None:
    """What :func:`inject` recorded, or None for a model without adapters."""
    owner = record_owner(model)
    return None if owner is None else vars(owner)[_RECORD]


def require_injection(model: nn.Module) -> Injection:
    """:func:`injection`, or an InputError that says what to call."""
    record = injection(model)
    if record is None:
        raise InputError(
            f"model ({type(model).__name__}) has no adapters; call inject or load_adapter first"
        )
    return record


def _generator(seed: int, path: str) -> torch.Generator:
    # The seed's lower 64 bits and the path through MD5: stable over Python versions, unlike hash().
    mixed = hashlib.md5(f"{seed & (2**64 - 1)}:{path}".encode(), usedforsecurity=False).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(mixed[:8], "little") >> 1)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


make_callable(inject)
