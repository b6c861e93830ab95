"""The update report: what training changed in every adapter tensor, and what it must not have changed.

Digests and sums of absolute differences see every update; ``allclose`` with loose tolerances does not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastlora.digest import PREFIX, adapter_tensors, combine, frozen_fingerprint, tensor_md5s
from fastlora.errors import InputError
from fastlora.findings import findings

WEIGHTS_FILE = "adapter_model.safetensors"
BLOCK = 2**20  # elements compared at once, in float64

State = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike


@dataclass(frozen=True)
class Snapshot:
    """The adapter at one moment: its tensors (copies on the CPU) by their names in the adapter file, and the
    fingerprint of the frozen weights (None: unknown, an adapter file holds none)."""

    tensors: Mapping[str, torch.Tensor]
    frozen: str | None = None


@dataclass(frozen=True)
class Row:
    """One adapter tensor before and after.

    Attributes:
        name: the module's path and ``lora_A.weight`` or ``lora_B.weight``.
        md5_before, md5_after: of the raw little-endian bytes.
        sum_abs_diff, max_abs_diff: over the elements, in float64.
        changed: share (0..1) of elements whose bits differ.
        equal: every bit is as it was.
        zero: every element is 0 after.
        norm: L2 norm after, in float64.
        finite: no NaN or infinity after.
        underflow: share (0..1) of non-zero partial gradients lost or kept under 10 bits; None: unknown.
    """

    name: str
    md5_before: str
    md5_after: str
    sum_abs_diff: float
    max_abs_diff: float
    changed: float
    equal: bool
    zero: bool
    norm: float
    finite: bool
    underflow: float | None = None


@dataclass(frozen=True)
class UpdateReport:
    """What :func:`update_report` found. ``findings`` holds one plain sentence each."""

    rows: list[Row]
    digest_before: str
    digest_after: str
    frozen_before: str | None
    frozen_after: str | None
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Plain values for ``report.json``; a number JSON cannot hold (NaN, infinity) becomes a string."""
        return {
            "digest": {"before": self.digest_before, "after": self.digest_after},
            "frozen_fingerprint": {"before": self.frozen_before, "after": self.frozen_after},
            "findings": list(self.findings),
            "tensors": [
                {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                for row in map(dataclasses.asdict, self.rows)
            ],
        }

    def table(self):
        """A ``rich.table.Table``, a row per adapter tensor; the caption says what the columns mean."""
        from rich import box  # only where something is printed
        from rich.table import Table

        table = Table(
            title="What training changed", caption=_CAPTION, caption_justify="left", box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
        )
        table.add_column("tensor", overflow="fold", min_width=18)
        for name in ("before", "after", "sum|d|", "max|d|", "changed", "norm", "lost"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name.removesuffix(".weight"), row.md5_before[:8], row.md5_after[:8],
                f"{row.sum_abs_diff:.1e}", f"{row.max_abs_diff:.1e}", _change(row), f"{row.norm:.3g}",
                "-" if row.underflow is None else f"{row.underflow:.1%}",
            )
        return table


_CAPTION = (
    "before, after: first 8 characters of the MD5 of the raw bytes. sum|d|, max|d|: sum and largest of the "
    "absolute differences. changed: share of elements with other bits, or what is special about the tensor. "
    "norm: its length afterwards. lost: share of gradients too small for fixed point (-: not known)."
)


def _change(row: Row) -> str:
    if not row.finite:
        return "NaN/inf"
    if row.equal:
        return "none, 0" if row.zero else "none"
    return "now 0" if row.zero else f"{row.changed:.1%}"


def snapshot(model: nn.Module) -> Snapshot:
    """Copy the adapter (to the CPU) and fingerprint the frozen weights, for a later :func:`update_report`."""
    tensors = {n: t.to("cpu", copy=True) for n, t in adapter_tensors(model).items()}
    return Snapshot(tensors, frozen_fingerprint(model))


def update_report(
    before: Snapshot | State,
    after: Snapshot | State,
    *,
    steps: int | None = None,
    underflow: Mapping[str, float] | None = None,
) -> UpdateReport:
    """Compare two states of an adapter, tensor by tensor.

    Args:
        before, after: each a :func:`snapshot`, a model, an adapter directory, or named tensors.
        steps: optimiser steps between them, if known; it decides whether an A that has not moved is right
            (after one step from B = 0 it is: its gradient is exactly 0) or a fault.
        underflow: ``AdamW.underflow_shares()``, if known.

    Raises:
        InputError: an adapter that cannot be read or is empty, other tensor names, another shape or dtype.
    """
    old, new = _snapshot_of(before, "before"), _snapshot_of(after, "after")
    if not new.tensors:
        raise InputError("after: got no adapter tensor; allowed is an adapter with at least one")
    odd = sorted(set(old.tensors) ^ set(new.tensors))
    if odd:
        raise InputError(f"before and after: got different tensors ({len(odd)}, the first is {odd[0]}); "
                         "allowed are two states of one adapter")
    md5_old, md5_new = tensor_md5s(old.tensors), tensor_md5s(new.tensors)
    lost = {_short(n): share for n, share in (underflow or {}).items()}
    rows = [
        _row(_short(n), old.tensors[n], new.tensors[n], md5_old[n], md5_new[n], lost.get(_short(n)))
        for n in sorted(new.tensors)
    ]
    starts_at_zero = {_short(n) for n, t in old.tensors.items() if not t.any()}
    return UpdateReport(
        rows,
        combine(old.tensors, md5_old),
        combine(new.tensors, md5_new),
        old.frozen,
        new.frozen,
        findings(rows, starts_at_zero, old.frozen, new.frozen, steps),
    )


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


def _snapshot_of(state: Snapshot | State, argument: str) -> Snapshot:
    if isinstance(state, Snapshot):
        return state
    if isinstance(state, nn.Module):
        return snapshot(state)
    if isinstance(state, Mapping):
        return Snapshot({n: t.detach().cpu() for n, t in state.items()})
    file = pathlib.Path(state)
    if not file.is_file():
        file = file / WEIGHTS_FILE
    if not file.is_file():
        raise InputError(f"{argument}: got {str(state)!r}; allowed is a folder with {WEIGHTS_FILE}")
    try:
        return Snapshot(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{argument}: got {str(file)!r}, which cannot be read ({error})") from error


def _row(
    name: str, old: torch.Tensor, new: torch.Tensor, md5_old: str, md5_new: str, underflow: float | None
) -> Row:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise InputError(f"{name}: got {new.dtype} {tuple(new.shape)} after; "
                         f"allowed is as before, {old.dtype} {tuple(old.shape)}")
    old, new = old.cpu().reshape(-1), new.cpu().reshape(-1)
    total = largest = square = 0.0
    changed = 0
    finite = zero = True
    for start in range(0, new.numel(), BLOCK):
        x, y = old[start : start + BLOCK].contiguous(), new[start : start + BLOCK].contiguous()
        bits = [t.view(torch.uint8).numpy().reshape(t.numel(), -1) for t in (x, y)]
        changed += int((bits[0] != bits[1]).any(1).sum())
        # numpy sums on one thread, so that two equal runs report equal digits
        a, b = x.double().numpy(), y.double().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(b - a)
            total += float(difference.sum())
            largest = float(np.maximum(largest, difference.max()))
            square += float((b * b).sum())
        finite = finite and bool(np.isfinite(b).all())
        zero = zero and not b.any()
    return Row(name, md5_old, md5_new, total, largest, changed / max(1, new.numel()), md5_old == md5_new,
               zero, math.sqrt(square), finite, underflow)
