"""What a run says while it runs: a line of JSON a step, a progress bar, TensorBoard on request."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

from fastlora.errors import InputError, TrainingError
from fastlora.files import atomic_write_text


def make_console():
    """A ``rich.console.Console`` on standard output; where that is no terminal, wide enough for the tables."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class RunLog:
    """``log.jsonl``: one JSON object a line, one line an optimiser step.

    A line is written whole: if the disk is full the file is cut back to its last whole line.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)

    def append(self, record: dict) -> None:
        """Write one line.

        Raises:
            TrainingError: the line could not be written; the file ends with the line before it.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes written")
            except OSError as error:
                file.truncate(size)
                raise TrainingError(f"{self.path}: the log line of step {record.get('step')} could not be "
                                    f"written ({error})") from error

    def read(self) -> list[dict]:
        """Every whole line. A last line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # all that follows a broken line is run again by --resume
        return records

    def keep(self, step: int) -> list[dict]:
        """Drop the lines of later steps than ``step`` (they will be run again); returns those kept."""
        records = [record for record in self.read() if record["step"] <= step]
        atomic_write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        return records


def memory_in_use(device) -> int:
    """Bytes: the peak allocated on a CUDA device, else this process's peak resident memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """A bar on a terminal (loss, tokens/s, fill, memory, time left); elsewhere a plain line now and then.

    Args:
        console: a ``rich.console.Console``.
        total: optimiser steps of the run. ``done``: those of an earlier session.
    """

    def __init__(self, console, total: int, done: int = 0) -> None:
        self.console, self.total = console, total
        self.tokens = self.padded = 0
        self.started = time.perf_counter()
        self._said = done
        self._bar = None
        if console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("step {task.completed}/{task.total}"), progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[shown]}"), progress.TimeElapsedColumn(),
                progress.TextColumn("left"), progress.TimeRemainingColumn(), console=console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, shown="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def restart_clock(self) -> None:
        """Leave what was slow for another reason (an evaluation, a compilation) out of tokens/s."""
        self.tokens = self.padded = 0
        self.started = time.perf_counter()

    def step(self, number: int, loss: float, rate: float, tokens: int, padded: int, memory: int) -> None:
        """Show that step ``number`` is done; ``tokens`` are real ones, ``padded`` all that were computed."""
        self.tokens += tokens
        self.padded += padded
        seconds = max(time.perf_counter() - self.started, 1e-9)
        shown = (f"loss {loss:.4f}  {self.tokens / seconds:,.0f} tokens/s  "
                 f"fill {self.tokens / self.padded:.2f}  {memory / 2**30:.1f} GiB")
        if self._bar is not None:
            self._bar.update(self._task, completed=number, shown=shown)
        elif number == self.total or number - self._said >= max(1, self.total // 20):
            self._said = number
            self.console.print(f"step {number}/{self.total}  {shown}  rate {rate:.2e}", highlight=False)


class TensorBoard:
    """Scalars for TensorBoard in ``folder``.

    Raises:
        InputError: the ``tensorboard`` package is not installed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def step(self, record: dict) -> None:
        """Write the numbers of one log line."""
        number = record["step"]
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second"):
            if record.get(name) is not None:
                self._writer.add_scalar(f"train/{name}", record[name], number)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def require_tensorboard() -> None:
    """Raise InputError, naming what to install, if TensorBoard is not there."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard = true: the package is not installed; "
                         "pip install 'fastlora[tensorboard]', or leave --tensorboard out")
