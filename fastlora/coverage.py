"""Which path every projection of a model takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastlora.callable_module import make_callable
from fastlora.errors import InputError
from fastlora.experts import ExpertLora
from fastlora.families import head_of
from fastlora.inject import lora_layers
from fastlora.modules import LoraLinear
from fastlora.ops import backend

_NOT_A_TARGET = "no adapter: not a target"
_FROZEN = "no adapter: frozen, computed in fixed blocks"


@dataclass(frozen=True)
class CoverageRow:
    """One linear layer, or all experts' weights of one adapted parameter: its path, its name in the
    block, the backend that runs it, and the reason."""

    path: str
    projection: str
    backend: str
    reason: str


def coverage(model: nn.Module, strict: bool = False) -> list[CoverageRow]:
    """One row for every linear layer and every adapted parameter of the model, in the model's order.

    The backend is ``"triton"`` (the library's CUDA kernels, the fast path), ``"reference"`` (the
    library's torch path: every CPU run) or ``"eager"`` (torch's own linear layer: no adapter there,
    or a merged one).

    Args:
        model: any model.
        strict: refuse a model without adapters, and any adapter that does not run on ``"triton"``.

    Raises:
        InputError: under ``strict``, naming the projections and reasons.
    """
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, (LoraLinear, ExpertLora)):
            backend_name, reason = lora_backend(module)
            if _is_head(model, module) and not module.merged:
                reason += ", in training inside the fused loss"
            rows.append(
                CoverageRow(module.target, module.target.rpartition(".")[2], backend_name, reason)
            )
        elif type(module).__name__ == "FrozenLinear":  # what fastlora.invariant puts in
            rows.append(CoverageRow(path, path.rpartition(".")[2], "reference", _FROZEN))
        elif isinstance(module, nn.Linear):
            rows.append(CoverageRow(path, path.rpartition(".")[2], "eager", _NOT_A_TARGET))
    if strict:
        _check_strict(model, rows)
    return rows


def coverage_lines(model: nn.Module) -> list[str]:
    """:func:`coverage` for people: one line for each backend and reason, with the projections and
    their number."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for row in coverage(model):
        counts = groups.setdefault((row.backend, row.reason), {})
        counts[row.projection] = counts.get(row.projection, 0) + 1
    return [
        f"{backend}: {', '.join(f'{name} x{count}' for name, count in counts.items())} ({reason})"
        for (backend, reason), counts in groups.items()
    ]


def lora_backend(layer: LoraLinear | ExpertLora) -> tuple[str, str]:
    """Backend and reason of one adapted layer."""
    if layer.merged:
        return "eager", "merged: the adapter is inside the weight"
    name, reason = backend.explain(layer.weight.device, layer.weight.dtype)
    return name, f"{reason}, one expert after the other" if isinstance(layer, ExpertLora) else reason


def _is_head(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer is a head that the fused loss knows."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is layer and head_of(model) is not None


def _check_strict(model: nn.Module, rows: list[CoverageRow]) -> None:
    adapted = {layer.target for layer in lora_layers(model)}
    if not adapted:
        raise InputError(
            "strict coverage: the model has no adapters; allowed is a model after inject"
        )
    slow = [row for row in rows if row.path in adapted and row.backend != "triton"]
    if slow:
        named = ", ".join(f"{row.path}: {row.backend} ({row.reason})" for row in slow[:3])
        more = f" and {len(slow) - 3} more" if len(slow) > 3 else ""
        raise InputError(
            f"strict coverage: allowed is the path triton for every adapter, but {named}{more}"
        )


make_callable(coverage)
