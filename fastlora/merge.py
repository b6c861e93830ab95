"""Put the adapter into the base weights and take it out again, the very same bytes back."""

from __future__ import annotations

import torch
from torch import nn

from fastlora.callable_module import make_callable
from fastlora.errors import InputError
from fastlora.experts import ExpertLora
from fastlora.inject import lora_layers, require_injection
from fastlora.modules import LoraLinear

# Rows of one weight that are merged at a time: bounds the float64 copies to a few MiB.
_ROWS = 1024


def merge(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """W <- W + scaling * B A in every adapted layer, in place; returns the model.

    The sum is taken in float64 and rounded to the weight's dtype (to a 16-bit one by way of fp32,
    as torch casts). Forward is then the plain linear layer, and A and B stop requiring gradients
    until :func:`unmerge`.

    Cost: with ``keep_base`` (the default) the original weight of every adapted layer is kept, on
        its own device, as
    long as the model stays merged: ``merge_cost(model)`` bytes, which for targets on all seven
        projections is nearly the size of the model again. With ``keep_base=False`` the originals
        are dropped at the end (they are needed until every layer has proved finite), and
        ``unmerge`` is refused.

    Raises:
        InputError: the model has no adapters, is merged already, or a merged weight would not be
            finite (the module is named). The model is then unchanged.
    """
    require_injection(model)
    layers = list(lora_layers(model))
    for layer in layers:
        if layer.merged:
            raise InputError(
                f"merge: {layer.path} is merged already; allowed is a model that is not"
            )
        if layer.weight.is_meta:
            raise InputError(f"merge: {layer.path} is on the meta device and has no values")
    done: list[LoraLinear | ExpertLora] = []
    for layer in layers:
        weight = _merged_weight(layer)
        if not torch.isfinite(weight).all():
            for earlier in done:
                _restore(earlier)
            raise InputError(
                f"merge: the merged weight of {layer.path} is not finite in {weight.dtype}; "
                "allowed are finite weights"
            )
        layer.kept_base = layer.weight.data
        layer.weight.data = weight
        layer.merged = True
        for factor in (layer.lora_A, layer.lora_B):
            factor.weight.requires_grad_(False)
        done.append(layer)
    if not keep_base:
        for layer in layers:
            layer.kept_base = None
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: every base weight gets its original bytes back from the kept copy;
    returns the model.

    Never by subtraction: W + s B A - s B A is not W in floating point.

    Raises:
        InputError: the model is not merged; the copy is absent (``keep_base=False``, or a model
            loaded from disk); or the merged weight was cast to another dtype since. The model is
            then unchanged.
    """
    require_injection(model)
    layers = list(lora_layers(model))
    if not any(layer.merged for layer in layers):
        raise InputError("unmerge: the model is not merged; allowed is a model after merge(model)")
    for layer in layers:
        kept = layer.kept_base
        if kept is None:
            raise InputError(
                f"unmerge: no copy of the base weight of {layer.path} was kept (keep_base=False); "
                "its bytes cannot be "
                "computed back, load the base model again"
            )
        if kept.dtype != layer.weight.dtype:
            raise InputError(
                f"unmerge: {layer.path} was cast from {kept.dtype} to {layer.weight.dtype} after "
                "the merge; allowed is "
                "the dtype it was merged in"
            )
    for layer in layers:
        _restore(layer)
    return model


def merge_cost(model: nn.Module) -> int:
    """Bytes that ``merge(model)`` keeps for ``unmerge`` (or is keeping): the adapted base weights'
    own size.

    Raises:
        InputError: the model has no adapters.
    """
    require_injection(model)
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in lora_layers(model))


def _restore(layer: LoraLinear | ExpertLora) -> None:
    # .to() moves bytes between devices and never changes them: the dtype is the same.
    layer.weight.data = layer.kept_base.to(layer.weight.device)
    layer.kept_base = None
    layer.merged = False
    for factor in (layer.lora_A, layer.lora_B):
        factor.weight.requires_grad_(True)


@torch.no_grad()
def _merged_weight(layer: LoraLinear | ExpertLora) -> torch.Tensor:
    result = torch.empty_like(layer.weight)
    for (weight, a, b), (merged, _, _) in zip(layer.products(layer.weight), layer.products(result)):
        a = a.double()
        for start in range(0, weight.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            delta = b[rows].double() @ a
            merged[rows] = (weight[rows].double() + layer.scaling * delta).to(weight.dtype)
    return result


make_callable(merge)
