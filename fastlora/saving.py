"""What a run leaves on disk while it trains: a checkpoint and the adapter, copied to the host at once and written beside the next steps.

Digests, file and fsync of an 8B model's half gigabyte take seconds; the copy takes a hundredth of one. Each file is written whole or not at
all, as everywhere; what fails is raised at the next step, at the next save, or at the end of the run.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from fastlora import adapter, checkpoint, rundir
from fastlora.digest import digest
from fastlora.errors import TrainingError
from fastlora.evaluate import best_point
from fastlora.files import atomic_write_text
from fastlora.log import RunLog


class Saver:
    """Saves the state of one :class:`~fastlora.train.Trainer` of ``model``, one save at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastlora-saver")
        self._logged: Future | None = None
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

    def save(self, run, record: dict | None = None) -> None:
        """Copy checkpoint and adapter as they are now, and write them behind the caller's back.

        Args:
            record: the step's line of the log, which gets the adapter's digest and is written before the checkpoint.
        """
        taken = self.take(run)
        best = best_point(run.held_out)
        folders = [run.folder, run.folder / rundir.BEST] if best and best[0] == run.done else [run.folder]
        config = run.config
        if record is not None:
            self._logged = self._thread.submit(_log, run.log, record, taken.adapter)
        self._pending = self._thread.submit(
            _write, self._logged, run.model, run.checkpoints, taken, config.keep_checkpoints, best and best[0], config.save_dtype, folders)
        run.due.saved()

    def logged(self) -> None:
        """Until the log has the line of the last save.

        Raises:
            TrainingError: it could not be written.
        """
        logged, self._logged = self._logged, None
        if logged is not None:
            logged.result()

    def check(self) -> None:
        """Raise what a save that has ended meanwhile failed with."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            TrainingError: it failed, or the adapter holds a value that is not finite; what stood on disk before it stands there still.
        """
        self.logged()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """:meth:`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _log(log: RunLog, record: dict, tensors: dict) -> None:
    log.append({**record, "digest": digest(tensors)})


def _write(logged, model, checkpoints, taken, keep, best, dtype, folders) -> None:
    if logged is not None:
        logged.result()  # no checkpoint of a step that the log does not have
    files = adapter.to_write(model, taken.adapter, dtype)
    checkpoint.write(checkpoints, taken, keep, best)
    for folder in folders:
        try:
            adapter.write_files(folder, *files)
        except OSError as error:
            raise TrainingError(f"{folder}: the adapter could not be written ({error}); the old file is whole") from error
    if len(folders) > 1:  # what `fastlora generate` reads the format from
        atomic_write_text(folders[1] / rundir.RUN, (folders[0] / rundir.RUN).read_text(encoding="utf-8"))
