"""The block that collects exact gradients: ``with fastlora.exact(model):`` around a step's micro-batches.

The sums themselves are in ``fastlora.token_sum``. They belong to the modules, are never saved, and live from
the start of a block to the optimiser step that uses them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastlora.callable_module import make_callable
from fastlora.errors import InputError
from fastlora.token_sum import (
    LSB_BITS,
    NO_CHUNK,
    TokenSum,
    check_all,
    read_stats,
    units_to_gradient,
    zero_all,
)

__all__ = [
    "LSB_BITS",
    "NO_CHUNK",
    "TokenSum",
    "check_all",
    "discard",
    "exact",
    "lora_modules",
    "read_stats",
    "units_to_gradient",
    "zero_all",
]

# Modules whose sums are open or wait for a step. While there are any, a hook watches every torch optimiser.
_held: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list = []


def lora_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every LoRA linear of ``model``, recognised by its ``lora_A`` and ``sums``."""
    found: list[tuple[str, nn.Module]] = []
    _collect(model, "", found, set())
    return found


def _collect(module: nn.Module, path: str, found: list[tuple[str, nn.Module]], seen: set[nn.Module]) -> None:
    """What ``named_modules`` would find, in its order, in a fraction of its time: a step asks several times."""
    if module in seen:
        return
    seen.add(module)
    if "lora_A" in module._modules and hasattr(module, "sums"):
        found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{path}.{name}" if path else name, found, seen)


def discard(model: nn.Module) -> None:
    """Drop the exact sums of ``model`` that no optimiser step has used, and leave exact mode."""
    release([m for _, m in lora_modules(model)])


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Collect the gradients of A and B exactly: put ALL micro-batches of one optimiser step inside.

    Backward passes inside add to integer sums and leave ``.grad`` None; a forward alone adds nothing.
    After the block call ``fastlora.AdamW.step(supervised_tokens=n)``, which uses up the sums. If the
    block ends by an error, the sums are zeroed: those of an unfinished step are never kept. Until the
    step, an optimiser that does not read the sums raises instead of stepping on nothing.

    Raises:
        InputError: no LoRA linear in ``model``, a block inside a block, or sums of an earlier block that
            no step has used (wrapping each micro-batch by itself would lose all but the last; to drop them
            on purpose: ``from fastlora.exact import discard; discard(model)``).
    """
    modules = [m for _, m in lora_modules(model)]
    if not modules:
        raise InputError("model: got one without LoRA linears; call fastlora.inject(model, config) first")
    if any(m.exact for m in modules):
        raise InputError("exact: this model is in an exact block already; blocks cannot be nested")
    if any(m.sums is not None and m.sums[0].pending for m in modules):
        raise InputError(
            "exact: the sums of the last block were not used; put all micro-batches of a step in one "
            "block and call fastlora.AdamW.step(supervised_tokens=n) after it, or drop them with "
            "`from fastlora.exact import discard; discard(model)`"
        )
    for m in modules:
        _open(m)
    _hold(modules)
    try:
        yield
    except BaseException:
        release(modules)
        raise
    for m in modules:
        _switch(m, False)
        for s in m.sums:
            s.accepting, s.pending = False, True


def _switch(module: nn.Module, on: bool) -> None:
    # a plain value: nn.Module's own way of setting it, which looks for parameters first, takes ten times as long
    object.__setattr__(module, "exact", on)


def _open(module: nn.Module) -> None:
    shared = getattr(module, "sums_from", None)
    if shared is not None:
        sums = shared()
        if module.sums is not sums:
            module.sums = sums
    else:
        parameters = (module.lora_A.weight, module.lora_B.weight)
        fits = module.sums is not None and all(
            s.total.shape == p.shape and s.total.device == p.device for s, p in zip(module.sums, parameters)
        )
        if not fits:
            module.sums = tuple(TokenSum(p.shape, p.device) for p in parameters)
    for s in module.sums:
        s.accepting, s.pending = True, False
    _switch(module, True)


def _hold(modules: list[nn.Module]) -> None:
    zero_all([s for m in modules for s in m.sums])
    _held.update(modules)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_other_optimisers))


def release(modules: list[nn.Module]) -> None:
    """Leave exact mode in these modules and zero their sums."""
    for m in modules:
        _switch(m, False)
        for s in m.sums or ():
            s.accepting = s.pending = False
        _held.discard(m)
    if not _held and _hooks:
        _hooks.pop().remove()
    zero_all([s for m in modules for s in m.sums or ()])


def _refuse_other_optimisers(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "reads_token_sums", False):
        return
    held = {id(p) for m in _held for p in (m.lora_A.weight, m.lora_B.weight)}
    if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            f"optimizer: got {type(optimizer).__module__}.{type(optimizer).__name__} for a model in "
            "exact mode, whose gradients are exact sums and not in .grad; use fastlora.AdamW"
        )


make_callable(exact)
