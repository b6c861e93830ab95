"""What an update report says in words: one plain sentence for each thing that is right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

LOST_TOO_MUCH = 0.01
FEW_CHANGED = 0.5


class TensorRow(Protocol):
    """What is read of a report's row (see ``fastlora.report.Row``)."""

    name: str
    changed: float
    equal: bool
    zero: bool
    finite: bool
    underflow: float | None


def findings(
    rows: Sequence[TensorRow],
    starts_at_zero: AbstractSet[str],
    frozen_before: str | None,
    frozen_after: str | None,
    steps: int | None,
) -> list[str]:
    """The sentences.

    Args:
        rows: one for each adapter tensor.
        starts_at_zero: names of the tensors that were all zero before.
        frozen_before, frozen_after: fingerprints of the frozen weights; None: unknown.
        steps: optimiser steps in between; None: unknown.
    """
    bad = [r for r in rows if not r.finite]
    found = [f"{_named(bad)} NaN or infinite values: do not use this adapter."] if bad else []
    found.append(_frozen(frozen_before, frozen_after))
    still = [r for r in rows if r.equal]
    if not still:
        found.append(f"All {len(rows)} adapter tensors changed.")
    elif len(still) == len(rows):
        found.append(_nothing_changed(len(rows), steps))
    else:
        found.append(f"{len(rows) - len(still)} of {len(rows)} adapter tensors changed.")
        found += _unchanged(still, {r.name: r for r in rows}, starts_at_zero, steps)
    few = [r for r in rows if not r.equal and not r.zero and r.changed < FEW_CHANGED]
    if few:
        found.append(
            f"{_named(few)} changes in under {FEW_CHANGED:.0%} of the elements: the updates may be smaller "
            "than the type can hold; check that the weights are fp32 and the learning rate is large enough."
        )
    lost = [r for r in rows if r.underflow is not None and r.underflow > LOST_TOO_MUCH]
    if lost:
        worst = max(r.underflow for r in lost)
        found.append(
            f"{_named(lost)} gradients too small for fixed point in over {LOST_TOO_MUCH:.0%} of the cases "
            f"(at worst {worst:.1%}): raise gradient_scale, for instance to 1024."
        )
    return found


def _frozen(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return "The frozen weights were not compared, because an adapter file does not hold them."
    if before == after:
        return f"The frozen weights are as they were (fingerprint {after[:8]}...)."
    return (
        f"The frozen weights CHANGED (fingerprint {before[:8]}... before, {after[:8]}... after): something "
        "other than the adapter was written, so the adapter may not fit the original model."
    )


def _nothing_changed(count: int, steps: int | None) -> str:
    if steps == 0:
        return f"None of the {count} adapter tensors changed, as no step was taken."
    return (
        f"None of the {count} adapter tensors changed: no step was taken, every learning rate was 0, or the "
        "loss does not reach the adapter."
    )


def _unchanged(
    still: Sequence[TensorRow],
    by_name: dict[str, TensorRow],
    starts_at_zero: AbstractSet[str],
    steps: int | None,
) -> list[str]:
    """Tell the A that rightly did not move at the first step from the tensors that training missed."""
    first, missed, late = [], [], []
    for r in still:
        if "lora_A" not in r.name:
            missed.append(r)
            continue
        b = r.name.replace("lora_A", "lora_B")
        moved = b in by_name and not by_name[b].equal
        if not (moved and b in starts_at_zero):
            missed.append(r)
        elif steps is None or steps <= 1:
            first.append(r)
        else:
            late.append(r)
    found = []
    if first:
        when = "after one step" if steps == 1 else "if only one step was taken"
        found.append(
            f"{len(first)} A tensors are bit-equal to their start while their B moved: that is right {when}, "
            "because with B = 0 the gradient of A is exactly 0."
        )
    if late:
        found.append(
            f"{_named(late)} still the exact start values after {steps} steps although B moved: the updates "
            "of A are lost; check that A is fp32 and gets a gradient."
        )
    zero = [r for r in missed if r.zero and "lora_B" in r.name]
    if zero:
        found.append(
            f"{_named(zero)} only zeros still and change nothing in the model: the loss does not reach their "
            "modules, or the gradients were 0."
        )
    told = {r.name for r in zero} | {r.name.replace("lora_B", "lora_A") for r in zero}
    rest = [r for r in missed if r.name not in told]
    if rest:
        found.append(f"{_named(rest)} still the exact start values: training did not reach them.")
    return found


def _named(rows: Sequence[TensorRow]) -> str:
    """"q_proj.lora_B.weight has" or "3 tensors (a, b, ...) have"."""
    if len(rows) == 1:
        return f"{rows[0].name} has"
    shown = ", ".join(r.name for r in rows[:2]) + (", ..." if len(rows) > 2 else "")
    return f"{len(rows)} tensors ({shown}) have"
