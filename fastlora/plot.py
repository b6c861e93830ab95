"""The loss curve as a picture: training and held-out loss by optimiser step."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastlora.files import atomic_write


def loss_curve(
    path: str | os.PathLike,
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float, float]] = (),
) -> None:
    """Draw the losses (nats per supervised token) and write a PNG, whole or not at all.

    Args:
        path: the file, for instance ``loss.png``.
        training: (step, loss of that step's global batch), steps counted from 1.
        held_out: (step, loss, standard error) after that many steps; 0 is before training.
    """
    # The figure's own canvas, not pyplot: no display, no global state, no backend chosen for the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training)
        alone = len(steps) == 1
        axes.plot(steps, losses, color="#8fb8de", linewidth=1, marker="o" if alone else None,
                  label="training, each step")
        if len(losses) >= 20:
            axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2, label="training, smoothed")
    if held_out:
        steps, losses, errors = zip(*held_out)
        axes.errorbar(steps, losses, yerr=errors, color="#c8551b", marker="o", capsize=3,
                      label="held out (± 1 standard error)")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if training or held_out:
        axes.legend(frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam corrects its moments)."""
    smoothed, average = [], 0.0
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**index))
    return smoothed
