"""Which parameters ``target_parameters`` means: PEFT's matching, for modules of experts that this library can run."""

from __future__ import annotations

import difflib

from torch import nn

from fastlora.config import LoraConfig, names_match
from fastlora.errors import InputError
from fastlora.families import FAMILIES, family_of

# What fastlora.experts computes: gate and up side by side, no bias.
_PARAMETERS = ("gate_up_proj", "down_proj")


def resolve_parameters(
    model: nn.Module, config: LoraConfig, *, lenient: bool = False
) -> dict[str, tuple[nn.Module, list[str]]]:
    """The parameters that ``config.target_parameters`` names: ``{path: (module, names in its order)}``.

    Nothing is changed. ``lenient`` is for files, where a name may match nothing or a parameter two names, as in PEFT.

    Raises:
        InputError: see :func:`fastlora.inject`.
    """
    names = config.target_parameters
    if names is None:
        return {}
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    parameters = {
        f"{path}.{name}": p for path, module in modules.items() for name, p in module.named_parameters(recurse=False)
    }
    found = [path for path in parameters if names_match(names, path)]
    if not lenient:
        _check_each_matches_once(names, found, modules)
        _check_other_fields(config, found)
    if not found:
        raise InputError(_nothing(names, modules))
    chosen: dict[str, tuple[nn.Module, list[str]]] = {}
    for path in found:
        owner, _, name = path.rpartition(".")
        _check_parameter(path, modules[owner], model)
        shared = [other for other, p in parameters.items() if p is parameters[path] and other != path]
        if shared:
            raise InputError(
                f"target_parameters: {path} is the same parameter as {', '.join(shared)}; allowed are parameters with "
                "one place in the model"
            )
        chosen.setdefault(owner, (modules[owner], []))[1].append(name)
    return chosen


def experts_of(paths: dict[str, nn.Module]) -> tuple[str, list[str]] | None:
    """The first module that keeps its experts as bare parameters, and their names."""
    for path, module in paths.items():
        found = _of_experts(module)
        if found and "experts" in path.lower() + type(module).__name__.lower():
            return path, found
    return None


def _of_experts(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def why_no_linear(path: str, parameters: list[str]) -> str:
    """Why experts are no ``target_modules``, and what to give instead."""
    instead = [".".join([*path.split(".")[-2:], name]) for name in parameters]
    return (
        f"{path} holds all its experts in {' and '.join(parameters)} of three dimensions, which are no modules; give "
        f"target_parameters={instead!r} (an A and a B for each expert)"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether anything watches the module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _check_each_matches_once(names: list[str], found: list[str], modules: dict[str, nn.Module]) -> None:
    for name in names:
        if not any(names_match([name], path) for path in found):
            raise InputError(_nothing([name], modules))
    for path in found:
        both = [name for name in names if names_match([name], path)]
        if len(both) > 1:
            raise InputError(
                f"target_parameters: {path} is matched twice, by {' and '.join(map(repr, both))}; allowed is one name a "
                "parameter"
            )


def _check_other_fields(config: LoraConfig, found: list[str]) -> None:
    """Fields that speak of modules alone, in PEFT too, must not seem to speak of parameters."""
    if config.layers_to_transform is not None:
        raise InputError(
            f"layers_to_transform is {config.layers_to_transform!r} beside target_parameters, which it does not choose "
            "from (as in PEFT); allowed is None, and target_parameters that name the layers, such as "
            f"{found[0]!r}"
        )
    for path in found:
        owner = path.rpartition(".")[0]
        if config.exclude_modules and any(names_match(config.exclude_modules, place) for place in (owner, path)):
            raise InputError(
                f"exclude_modules is {config.exclude_modules!r}, which matches {path}; it excludes no parameter (as in "
                "PEFT): leave it out of target_parameters"
            )


def _check_parameter(path: str, module: nn.Module, model: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    kind, family = type(module).__name__, family_of(model)
    if isinstance(module, nn.Linear):
        raise InputError(
            f"target_parameters: {path} belongs to a linear layer; give target_modules={[owner.rpartition('.')[2]]!r}"
        )
    if kind not in family.by_token or not _has_shapes(module):
        known = ", ".join(row.model_type for row in FAMILIES.values() if row.by_token)
        raise InputError(
            f"target_parameters: {path} belongs to a {kind} of model type {family.model_type!r}; allowed are "
            f"{' and '.join(_PARAMETERS)} of the experts of {known}"
        )
    if has_hooks(module) or nn.utils.parametrize.is_parametrized(module):
        raise InputError(
            f"target_parameters: {owner} carries hooks or a parametrization that its replacement would drop; allowed are "
            "plain modules of experts"
        )
    if not module._parameters[name].is_floating_point():
        raise InputError(
            f"target_parameters: {path} is of type {module._parameters[name].dtype}; allowed are floating-point weights"
        )


def _has_shapes(module: nn.Module) -> bool:
    """Whether this is what fastlora.experts computes: [E, 2 I, H] and [E, H, I], and nothing more."""
    if set(module._parameters) != set(_PARAMETERS):
        return False
    up, down = (module._parameters[name].shape for name in _PARAMETERS)
    return len(down) == 3 and up == (down[0], 2 * down[2], down[1])


def _nothing(names: list[str], modules: dict[str, nn.Module]) -> str:
    what = f"target_parameters is {names!r}" if len(names) > 1 else f"target_parameters: {names[0]!r}"
    paths = [f"{path}.{name}" for path, module in modules.items() for name in _of_experts(module)]
    if not paths:
        return f"{what}: matches nothing; the model keeps no experts as parameters, give target_modules"
    endings = sorted({".".join(path.split(".")[-3:]) for path in paths})
    close = difflib.get_close_matches(names[0], [*endings, *paths], n=3, cutoff=0.6)
    allowed = f"{', '.join(close)} (near misses)" if close else ", ".join(endings[:12])
    return f"{what}: matches nothing; allowed: {allowed}"
