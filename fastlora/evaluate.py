"""Held-out loss with its standard error, and what its course says."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch

from fastlora import blocks, packing, stream
from fastlora.data import Row
from fastlora.errors import TrainingError
from fastlora.setup import Objective


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss of held-out rows.

    Attributes:
        losses: summed loss of each row's supervised tokens, nats. ``tokens``: their number, for each row.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Nats per supervised token over all rows."""
        return math.fsum(self.losses) / sum(self.tokens)

    @property
    def standard_error(self) -> float:
        """Of :attr:`loss`; rows are the units that were drawn, so tokens of one row may be alike."""
        return ratio_error(self.losses, self.tokens)


def ratio_error(totals: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of sum(totals) / sum(weights) over m independent pairs; NaN for fewer than two.

    The usual linearisation of a ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4):
    sqrt(m / (m - 1) * sum (t_i - R w_i)^2) / sum(weights).
    """
    m, weight = len(totals), math.fsum(weights)
    if m < 2:
        return math.nan
    ratio = math.fsum(totals) / weight
    square = math.fsum((t - ratio * w) ** 2 for t, w in zip(totals, weights))
    return math.sqrt(m / (m - 1) * square) / weight


def paired(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """(change of the loss, its standard error) over the same rows: row by row, so that what makes a row hard
    cancels."""
    changes = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    return math.fsum(changes) / sum(before.tokens), ratio_error(changes, before.tokens)


@torch.no_grad()
def evaluate(
    objective: Objective, rows: Sequence[Row], cuts: Sequence[Sequence[int]], alignment: int,
    device: torch.device,
) -> Evaluation:
    """The plain cross-entropy of every row (no label smoothing, no z-loss), without dropout and without touching
    gradients or sums.

    Args:
        rows: the held-out rows. cuts: micro-batches as indices into them (:func:`packing.plan`); the result
            does not depend on them where the model is exact under splitting.

    Raises:
        TrainingError: a loss that is not finite; the row's line is named.
    """
    model, objective = objective.model, objective.plain()
    was_training = model.training
    ids = packing.sample_ids(rows)
    losses = [0.0] * len(rows)
    model.eval()
    try:
        with blocks.single_thread() if device.type == "cpu" else contextlib.nullcontext():
            for cut in cuts:
                batch = packing.collate([rows[i] for i in cut], [ids[i] for i in cut], alignment, device)
                with stream.use(batch.stream):
                    for index, loss in zip(cut, objective(batch).documents.tolist(), strict=True):
                        losses[index] = loss
    finally:
        model.train(was_training)
    for row, loss in zip(rows, losses):
        if not math.isfinite(loss):
            raise TrainingError(f"held-out data, line {row.line}: the loss is {loss}")
    return Evaluation(tuple(losses), tuple(row.supervised for row in rows))


def best_point(held_out: Sequence[tuple[int, float, float]]) -> tuple[int, float, float] | None:
    """The point (step, loss, standard error) of the lowest held-out loss, the earliest of equals."""
    return min(held_out, key=lambda point: point[1]) if held_out else None


def out_of_patience(held_out: Sequence[tuple[int, float, float]], patience: int) -> bool:
    """Whether ``patience`` evaluations (0: never) have passed without a new lowest held-out loss (Prechelt, Early Stopping -
    But When?, 1998, the criterion UP with strips of one evaluation)."""
    best = best_point(held_out)
    return bool(patience) and best is not None and sum(step > best[0] for step, *_ in held_out) >= patience


def memorising(
    training: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float, float]]
) -> str | None:
    """One sentence if held-out loss rises while training loss falls, else None.

    Said when the last held-out loss lies above the lowest one by more than two of its standard errors, and
    the mean training loss since that lowest one is below the mean before it.

    Args:
        training: (step, loss) of every step. ``held_out``: (step, loss, standard error).
    """
    if len(held_out) < 2:
        return None
    best_step, best, _ = best_point(held_out)
    last_step, last, error = held_out[-1]
    early = [loss for step, loss in training if step <= best_step]
    late = [loss for step, loss in training if step > best_step]
    if not late or not last > best + 2 * (error if math.isfinite(error) else 0.0):
        return None
    falls = not early or math.fsum(late) / len(late) < math.fsum(early) / len(early)
    if not early:  # held-out loss rose from the start: does training loss fall within the run?
        half = len(late) // 2
        falls = half > 0 and math.fsum(late[half:]) / (len(late) - half) < math.fsum(late[:half]) / half
    if not falls:
        return None
    return (f"Held-out loss rose from {best:.4f} (step {best_step}) to {last:.4f} (step {last_step}) while "
            "training loss fell: the adapter is memorising; train fewer steps, or on more data.")
