"""The course of a run as a picture: losses, learning rate, gradient norm and throughput by optimiser step."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator, Sequence

from fastlora.files import atomic_write

# More points than a picture has columns only make drawing slow.
MOST_POINTS = 2000


def run_curves(
    path: str | os.PathLike, records: Sequence[dict], held_out: Sequence[tuple[int, float, float]] = (),
) -> None:
    """Draw a run so far and write a PNG, whole or not at all: losses, and below them learning rate, gradient norm and tokens
    a second.

    Args:
        path: the file, for instance ``loss.png``.
        records: lines of the log: step, counted from 1, loss (nats per supervised token), learning_rate, grad_norm,
            tokens_per_second.
        held_out: (step, loss, standard error) after that many steps; 0 is before training.
    """
    figure = _drawn(records, held_out)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _drawn(records: Sequence[dict], held_out: Sequence[tuple[int, float, float]]):
    """The figure of :func:`run_curves`."""
    # The figure's own canvas, not pyplot: no display, no global state, no backend chosen for the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7.4), dpi=120)
    FigureCanvasAgg(figure)
    # Fixed margins: fitting those of four panels takes longer than drawing them.
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.06, top=0.98, hspace=0.16)
    top, *below = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 1, 1))
    records = records[:: -(-len(records) // MOST_POINTS) or 1]
    _losses(top, [(record["step"], record["loss"]) for record in records], held_out)
    top.set_xlabel("")
    names = (("learning_rate", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens/s"))
    for axes, (field, label) in zip(below, names):
        points = [(record["step"], record[field]) for record in records if record.get(field) is not None]
        if points:
            axes.plot(*zip(*points), color="#1f5fa8", linewidth=1, marker="o" if len(points) == 1 else None)
        _style(axes, label)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    below[-1].set_xlabel("optimiser step")
    return figure


@functools.cache
def _warm_up() -> None:
    _drawn([{"step": 1, "loss": 1.0}], ()).savefig(io.BytesIO(), format="png")


@contextlib.contextmanager
def warmed_up() -> Iterator[None]:
    """Import what draws and find its fonts meanwhile: seconds at the first picture of a process, which a run would stand still for."""
    thread = threading.Thread(target=_warm_up, name="fastlora-plot")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _style(axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _losses(axes, training: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float, float]]) -> None:
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
    _style(axes, "loss (nats per supervised token)")
    if training or held_out:
        axes.legend(frameon=False)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam corrects its moments)."""
    smoothed, average = [], 0.0
    for index, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**index))
    return smoothed
