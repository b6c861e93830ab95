"""What a run leaves on disk while it trains: a checkpoint and the adapter, copied to the host at once and written beside the next steps.

Digests, file and fsync of an 8B model's half gigabyte take seconds; the copy takes a hundredth of one. Each file is written whole or not at
all, as everywhere; what fails is raised at the next step, at the next save, or at the end of the run.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from fastlora import adapter, checkpoint, rundir
from fastlora.errors import TrainingError
from fastlora.evaluate import best_point
from fastlora.files import atomic_write_text


class Saver:
    """Saves the state of one :class:`~fastlora.train.Trainer` of ``model``, one save at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastlora-saver")
        self._pending: Future | None = None
        self._room = self._thread.submit(checkpoint.Room, model)

    def take(self, run) -> checkpoint.Taken:
        """Copy adapter, optimiser and position of ``run``, the Trainer, to the host, once the last save is on disk.

        Raises:
            TrainingError: the save before this one failed.
        """
        self.wait()
        plain = {name: value and [list(value.losses), list(value.tokens)] for name, value in (("before", run.before), ("after", run.after))}
        extra = {"held_out": list(run.held_out), **plain, "versions": rundir.versions(), "underflow": run.optimizer.underflow_counts()}
        return checkpoint.take(run.done, run.model, run.optimizer, run.identity, extra, self._room.result())

    def save(self, run, taken: checkpoint.Taken | None = None) -> None:
        """Write checkpoint and adapter behind the caller's back: as they are now, or as they were ``taken``."""
        taken = self.take(run) if taken is None else taken
        best = best_point(run.held_out)
        folders = [run.folder, run.folder / rundir.BEST] if best and best[0] == run.done else [run.folder]
        config = run.config
        self._pending = self._thread.submit(
            _write, run.model, run.checkpoints, taken, config.keep_checkpoints, best and best[0], config.save_dtype, folders)
        run.due.saved()

    def check(self) -> None:
        """Raise what a save that has ended meanwhile failed with."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            TrainingError: it failed, or the adapter holds a value that is not finite; what stood on disk before it stands there still.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """:meth:`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _write(model, checkpoints, taken, keep, best, dtype, folders) -> None:
    files = adapter.to_write(model, taken.adapter, dtype)
    checkpoint.write(checkpoints, taken, keep, best)
    for folder in folders:
        try:
            adapter.write_files(folder, *files)
        except OSError as error:
            raise TrainingError(f"{folder}: the adapter could not be written ({error}); the old file is whole") from error
    if len(folders) > 1:  # what `fastlora generate` reads the format from
        atomic_write_text(folders[1] / rundir.RUN, (folders[0] / rundir.RUN).read_text(encoding="utf-8"))
