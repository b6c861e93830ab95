"""Does another cut of the first batch give the same gradients on this machine?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastlora import packing
from fastlora.data import Row
from fastlora.exact import discard, lora_modules

if TYPE_CHECKING:
    from fastlora.train import Trainer

# B is 0 at the start, which hides dA and everything behind it; for the comparison it gets small values.
TRIAL_SCALE = 2.0**-6


def exactness_line(
    trainer: Trainer, rows: Sequence[Row], ids: Sequence[int], not_exact: Sequence[tuple[str, str]]
) -> str:
    """The line a run prints about its own exactness.

    Args:
        trainer: with model, objective and limit ready. rows, ids: the first global batch.
        not_exact: (module, reason) of what is known not to be independent of the cut.

    Returns:
        What is claimed, or ``exactness not claimed: <module>: <reason>``. On CUDA the exact sums of the first batch are compared
        under two cuts first, and one that differs is such a reason.
    """
    if trainer.float_sums:
        return "float sums (a control): the adapter depends on how each batch is cut"
    if not_exact:
        module, reason = not_exact[0]
        more = f" (and {len(not_exact) - 1} more)" if len(not_exact) > 1 else ""
        return f"exactness not claimed: {module}: {reason}{more}"
    if trainer.device.type != "cuda":
        return ("exact under splitting: on this CPU the adapter's bytes do not depend on micro-batches, "
                "order inside a batch, or threads")
    odd, tried = compare(trainer, rows, ids)
    if odd is not None:
        return f"exactness not claimed: {odd}: its gradient sum differs between {tried}"
    return ("exact under splitting: on this GPU model, driver and set of versions the adapter's bytes do not depend on micro-batches or "
            f"order inside a batch; first batch cut in two ways ({tried}): equal")


def compare(trainer: Trainer, rows: Sequence[Row], ids: Sequence[int]) -> tuple[str | None, str]:
    """(first module whose sums differ between two cuts of ``rows``, or None; the two cuts in words).

    Parameters, sums and gradients are left as they were.
    """
    lengths = [packing.padded_length(len(row), trainer.alignment) for row in rows]
    cuts = packing.plan(rows, max(trainer.limit, *lengths), trainer.alignment)
    alone = [[i] for i in range(len(rows))]
    if len(cuts) == len(alone) and len(rows) > 1:
        alone = packing.plan(rows, sum(sorted(lengths)[-2:]), trainer.alignment)
    modules = lora_modules(trainer.model)
    kept = [m.lora_B.weight.detach().clone() for _, m in modules]
    try:
        for index, (_, m) in enumerate(modules):
            generator = torch.Generator().manual_seed(index)
            trial = torch.randn(m.lora_B.weight.shape, generator=generator) * TRIAL_SCALE
            with torch.no_grad():
                m.lora_B.weight.copy_(trial)
        found = []
        # Under the guard against a lack of memory, which may halve the first cuts; the second are smaller, but may still lack what the
        # allocator holds in pieces from the first.
        for cut in (None, alone):
            trainer.in_memory(rows, lambda c, cut=cut: trainer.sums(rows, ids, cut or c, 1))
            found.append([[s.total.clone() for s in m.sums] for _, m in modules])
            discard(trainer.model)
    finally:
        discard(trainer.model)
        with torch.no_grad():
            for (_, m), before in zip(modules, kept):
                m.lora_B.weight.copy_(before)
    tried = f"{len(cuts)} against {len(alone)} micro-batches"
    # Backward begins at the end: the last module that differs is the first that was computed differently.
    for (name, _), one, two in reversed(list(zip(modules, *found))):
        if not all(torch.equal(a, b) for a, b in zip(one, two)):
            return name, tried
    return None, tried
