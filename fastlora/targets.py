"""Which modules a configuration means: PEFT's matching, with an error wherever PEFT would go on
silently."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fastlora.config import LoraConfig, names_match, pattern_matches
from fastlora.errors import InputError
from fastlora.families import family_of
from fastlora.target_parameters import experts_of, has_hooks, resolve_parameters, why_no_linear


class Targets(NamedTuple):
    """What a configuration means in a model.

    Attributes:
        linear: ``{path: module}`` of linear layers, in the model's order.
        experts: ``{path: (module, names of parameters)}`` of modules of experts.
        config: the configuration with ``None`` and ``"all-linear"`` replaced by names.
    """

    linear: dict[str, nn.Linear]
    experts: dict[str, tuple[nn.Module, list[str]]]
    config: LoraConfig


def resolve_targets(model: nn.Module, config: LoraConfig, *, lenient: bool = False) -> Targets:
    """Find the targets of ``config`` in ``model``; nothing is changed.

    ``lenient`` is for files: there PEFT lets a name match nothing or a module match two names, and
    the tensors of the file say what is right.

    Raises:
        InputError: see :func:`fastlora.inject`.
    """
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    config = _by_name(model, config, paths)
    found = [path for path in paths if _is_target(config, path)]
    if not lenient:
        _check_each_matches_once(config, paths, found)
    experts = resolve_parameters(model, config, lenient=lenient)
    if not found and not (experts and (lenient or not config.target_modules)):
        raise InputError(
            _nothing(f"target_modules is {config.target_modules!r}", config.target_modules, paths)
        )
    refused = _refused(model, paths)
    owners = _parameter_owners(paths)
    for path in found:
        _check_linear(path, paths[path], refused)
        _check_unshared(path, paths[path], paths, owners)
    adapted = [*found, *(f"{path}.{name}" for path, (_, names) in experts.items() for name in names)]
    if not lenient:
        _check_patterns(config, adapted)
    config = _sort_patterns(config, adapted)
    return Targets({path: paths[path] for path in found}, experts, config)


def _by_name(model: nn.Module, config: LoraConfig, paths: dict[str, nn.Module]) -> LoraConfig:
    if config.target_modules is None:
        return replace(config, target_modules=sorted(family_of(model).projections))
    if config.target_modules != "all-linear":
        return config
    linear = [
        path
        for path, module in paths.items()
        if isinstance(module, nn.Linear) and not _is_head(model, path, module)
    ]
    if not linear:
        raise InputError(
            f"target_modules is 'all-linear', but {type(model).__name__} has no linear layer"
        )
    endings = sorted({path.rpartition(".")[2] for path in linear})
    # Endings read better than hundreds of paths; they are used where they mean the very same
    # modules.
    same = [path for path in paths if names_match(endings, path)] == linear
    return replace(config, target_modules=endings if same else linear)


def _is_target(config: LoraConfig, path: str) -> bool:
    if config.exclude_modules and names_match(config.exclude_modules, path):
        return False
    if not names_match(config.target_modules, path):
        return False
    if isinstance(config.target_modules, str) or config.layers_to_transform is None:
        return True
    index = _layer_index(config.layers_pattern, path)
    wanted = config.layers_to_transform
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def _layer_index(pattern: list[str] | str | None, path: str) -> int | None:
    # PEFT's rule: the first numbered segment that follows a name (or one of the named lists) is the
    # layer.
    if not pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(match[1]) if match else None
    for name in [pattern] if isinstance(pattern, str) else pattern:
        match = re.match(rf"(?:^|.*?\.)(?:{name})\.(?P<index>\d+)\.", path)
        if match:
            return int(match["index"])
    return None


def _check_each_matches_once(
    config: LoraConfig, paths: dict[str, nn.Module], found: list[str]
) -> None:
    excluded = config.exclude_modules
    for names in [excluded] if isinstance(excluded, str) else [[name] for name in excluded or ()]:
        if not any(names_match(names, path) for path in paths):
            raise InputError(_nothing(f"exclude_modules: {names!r}", names, paths))
    if isinstance(config.target_modules, str):
        return
    for name in config.target_modules:
        if not any(names_match([name], path) for path in paths):
            raise InputError(_nothing(f"target_modules: {name!r}", [name], paths))
        if not any(names_match([name], path) for path in found):
            raise InputError(
                f"target_modules: {name!r} matches modules, but "
                f"exclude_modules={config.exclude_modules!r} and "
                f"layers_to_transform={config.layers_to_transform!r} leave none of them; allowed "
                "is a name that "
                "keeps one"
            )
    for path in found:
        names = [name for name in config.target_modules if names_match([name], path)]
        if len(names) > 1:
            raise InputError(
                f"target_modules: {path} is matched twice, by {' and '.join(map(repr, names))}; "
                "allowed is one name "
                "a module"
            )


def _check_linear(path: str, module: nn.Module, refused: dict[str, str]) -> None:
    kind = type(module).__name__
    if path in refused:
        raise InputError(f"target_modules: {path} is {refused[path]}")
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            raise InputError(
                f"target_modules: {path} is a {kind} with a forward of its own (quantised, "
                "offloaded or wrapped); "
                "allowed are plain torch.nn.Linear layers"
            )
        if nn.utils.parametrize.is_parametrized(module) or has_hooks(module):
            raise InputError(
                f"target_modules: {path} carries hooks or a parametrization that its replacement "
                "would drop; allowed "
                "are plain torch.nn.Linear layers"
            )
        if not module.weight.is_floating_point():
            raise InputError(
                f"target_modules: {path} has a weight of type {module.weight.dtype}; allowed are "
                "floating-point weights"
            )
        return
    inside = [
        f"{path}.{name}"
        for name, child in module.named_modules()
        if name and isinstance(child, nn.Linear)
    ]
    experts = experts_of({path: module})
    if experts is not None:
        raise InputError(f"target_modules: {why_no_linear(*experts)}")
    hint = f"; the linear layers inside it: {', '.join(inside[:8])}" if inside else ""
    raise InputError(
        f"target_modules: {path} is a {kind}, allowed are torch.nn.Linear layers{hint}"
    )


def _check_unshared(
    path: str, module: nn.Module, paths: dict[str, nn.Module], owners: dict[int, list[str]]
) -> None:
    twins = [other for other, candidate in paths.items() if candidate is module and other != path]
    if twins:
        raise InputError(
            f"target_modules: {path} is matched twice: the same module stands at "
            f"{', '.join(twins)} too; allowed are "
            "modules with one place in the model"
        )
    shared = [other for other in owners[id(module.weight)] if other != f"{path}.weight"]
    if shared:
        raise InputError(
            f"target_modules: the weight of {path} is tied to {', '.join(shared)}, which an "
            "adapter here would not "
            "reach (and a merge would change); allowed are layers with a weight of their own"
        )


def _is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether this is the output head, which ``"all-linear"`` leaves out as PEFT does."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return path.rpartition(".")[2] == "lm_head" if head is None else module is head


def _refused(model: nn.Module, paths: dict[str, nn.Module]) -> dict[str, str]:
    """A tied output head and the input embeddings by path, each with the reason why it takes no
    adapter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    found: dict[str, str] = {}
    for path, module in paths.items():
        if head is not None and module is head and table is not None and head.weight is table.weight:
            found[path] = (
                "the output head, and its weight is tied to the token embeddings: a merge would change "
                "both, and the adapter is on one; allowed are the linear layers before it, or a head "
                "untied before inject (lm_head.weight = nn.Parameter(lm_head.weight.clone()), "
                "config.tie_word_embeddings = False)"
            )
        elif table is not None and module is table:
            found[path] = (
                "the table of token embeddings, no linear layer: LoRA on embeddings is not "
                "supported; allowed are linear layers"
            )
    return found


def _parameter_owners(paths: dict[str, nn.Module]) -> dict[int, list[str]]:
    owners = defaultdict(list)
    for path, module in paths.items():
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{path}.{name}")
    return owners


def _check_patterns(config: LoraConfig, found: list[str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(pattern_matches(key, path) or key == path for path in found):
                near = _near(key, found)
                raise InputError(f"{name}: {key!r} matches none of the targets; allowed: {near}")


def _sort_patterns(config: LoraConfig, found: list[str]) -> LoraConfig:
    """Patterns with sorted keys (stable files) where that order means the same for every target."""
    ordered = replace(
        config,
        rank_pattern=dict(sorted(config.rank_pattern.items())),
        alpha_pattern=dict(sorted(config.alpha_pattern.items())),
    )
    for path in found:
        before = (config.rank_for(path), config.alpha_for(path))
        if before != (ordered.rank_for(path), ordered.alpha_for(path)):
            return config
    return ordered


def _nothing(what: str, names: list[str] | str, paths: dict[str, nn.Module]) -> str:
    experts = experts_of(paths)
    if experts is not None and re.search("gate|up|down|experts|w1|w2|w3", str(names)):
        return f"{what}: matches no linear layer; {why_no_linear(*experts)}"
    linear = [path for path, module in paths.items() if isinstance(module, nn.Linear)]
    if isinstance(names, str):
        return (
            f"{what}: matches nothing; it must match a whole path, such as {_near(names, linear)}"
        )
    return f"{what}: matches nothing; allowed: {_near(names[0], linear)}"


def _near(name: str, paths: list[str]) -> str:
    """Near misses of ``name`` among paths and their endings, or the endings there are."""
    endings = sorted({path.rpartition(".")[2] for path in paths})
    close = difflib.get_close_matches(name, endings, n=3, cutoff=0.6)
    close += difflib.get_close_matches(name, paths, n=3, cutoff=0.6) if "." in name else []
    if close:
        return f"{', '.join(close)} (near misses)"
    return ", ".join(endings[:12]) or "nothing: the model has no linear layer"
