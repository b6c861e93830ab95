"""The data of a run: read for training and for evaluation alike, with a bar where it takes long."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from fastlora import data, packing, rundir, sources, token_rows
from fastlora.train_config import TrainConfig


def read(config: TrainConfig, tokenizer, max_length: int | None, console) -> tuple[data.RowSet, data.RowSet | None]:
    """(rows to train on, held-out rows or None) as ``config`` says.

    Args:
        max_length: the most tokens a row may have. console: where a bar is drawn, if it is a terminal.

    Raises:
        InputError: see :func:`fastlora.data.read_rows`.
    """
    options = {"max_length": max_length, "on_bad_row": config.on_bad_row, "on_long_row": config.on_long_row,
               "cache": config.token_cache or config.folder.parent / rundir.TOKENS, "always_cache": bool(config.token_cache)}
    found = []
    for path in (config.data, config.eval_data):
        if path is None:
            found.append(None)
            continue
        with bar(console, path) as progress:
            found.append(data.read_rows(path, tokenizer, **options, progress=progress))
    return found[0], found[1]


@contextlib.contextmanager
def bar(console, path: str | os.PathLike) -> Iterator[Callable[[int, int], None]]:
    """What ``read_rows`` may report to: a bar on a terminal, one line elsewhere; nothing until it is called."""
    from rich import progress

    shown = progress.Progress(
        progress.TextColumn("tokenizing {task.description}"), progress.BarColumn(bar_width=None), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )
    task = None

    def report(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            task = shown.add_task(os.path.basename(os.path.normpath(path)), total=total)
            if console.is_terminal:
                shown.start()
            else:
                console.print(f"tokenizing {path}: {total / 1e6:,.1f} MB", highlight=False, markup=False)
        shown.update(task, completed=done)

    try:
        yield report
    finally:
        shown.stop()


# Fewer optimiser steps than this are not many: a newcomer's thirty rows make two.
FEW = 10


def few_steps(config: TrainConfig, total: int) -> str | None:
    """A sentence where the data's size alone makes the run too short to change much."""
    if config.steps is not None or total >= FEW:
        return None
    steps = "1 optimiser step" if total == 1 else f"{total} optimiser steps"
    return (f"few steps: this data makes {steps} of {config.batch_size} sequences, after which the adapter has hardly moved; "
            "`fastlora advise --model DIR --data FILE` fits batch size and epochs to it")


def lines(training: data.RowSet, held_out: data.RowSet | None, alignment: int) -> list[str]:
    """What a run says of its data."""
    fill = packing.fill_ratio(token_rows.lengths(training.rows), alignment)
    found = [f"data: {training.summary()}; fill {fill:.2f} when padded to {alignment}", *training.notes, training.tokens]
    if held_out is not None:
        found += [f"held out: {held_out.summary()}", *held_out.notes, held_out.tokens]
    return [line for line in found if line]


def check(config: TrainConfig) -> None:
    """The data files are there and of a kind that can be read: known before a model is loaded.

    Raises:
        InputError: see :func:`fastlora.sources.find_files` and :func:`fastlora.sources.kind_of`.
    """
    for path in filter(None, (config.data, config.eval_data)):
        for file in sources.find_files(path)[0]:
            sources.kind_of(file)
