"""What a run leaves behind: report.json, the picture, the table on the screen, the result as an object."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING

from fastlora import packing, rundir, token_rows
from fastlora.evaluate import Evaluation, best_point, memorising, paired
from fastlora.files import atomic_write_text
from fastlora.log import RunLog, memory_in_use
from fastlora.plot import run_curves
from fastlora.report import update_report

if TYPE_CHECKING:
    from fastlora.train import Trainer


@dataclasses.dataclass
class TrainResult:
    """What a run came to.

    Attributes:
        steps: optimiser steps done in all. ``total``: those planned. ``signal``: the signal that stopped it.
        digest: the adapter's MD5 (see :func:`fastlora.digest`). ``report``: the content of report.json.
        losses: (step, nats per supervised token) of every step.
        held_out: (step, loss, standard error), step 0 before training. ``before``, ``after``: the first and
            last of these in full, or None without held-out data.
        folder: where the run's files are.
    """

    steps: int
    total: int
    signal: int | None
    digest: str
    report: dict
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float, float]]
    before: Evaluation | None
    after: Evaluation | None
    folder: pathlib.Path

    @property
    def log(self) -> list[dict]:
        """The lines of log.jsonl, read anew."""
        return RunLog(self.folder / rundir.LOG).read()


def slim(record: dict) -> dict:
    """What of a log line stays in memory: all but the parts that grow with the batch."""
    return {name: value for name, value in record.items() if name not in ("micro_batches", "codes")}


def draw(trainer: Trainer) -> None:
    """Write loss.png as it stands."""
    run_curves(trainer.folder / rundir.PICTURE, trainer.records, trainer.held_out)


def finish(trainer: Trainer, signal: int | None) -> TrainResult:
    """Write report.json, print the update report and what to do next."""
    update = update_report(trainer.start, trainer.model, steps=trainer.done,
                           underflow=trainer.optimizer.underflow_shares())
    sentence = memorising(trainer.losses, trainer.held_out)
    report = {
        "steps": trainer.done, "planned_steps": trainer.total, "stopped_by_signal": signal,
        "stopped_early": trainer.ended_early(),
        "loss": {"first": trainer.losses[0][1], "last": trainer.losses[-1][1]} if trainer.losses else None,
        "held_out": _held_out(trainer), "memorising": sentence, "exactness": trainer.exactness,
        "float_sums": trainer.float_sums, **update.as_dict(), **_totals(trainer),
        "peak_memory_bytes": memory_in_use(trainer.device), "device": str(trainer.device),
        "versions": rundir.versions(), "data": {"format": trainer.data.format, "shape": trainer.data.shape, "files": trainer.data.files,
                 **trainer.data.counts},
    }
    atomic_write_text(trainer.folder / rundir.REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    say = trainer.console.print
    say(update.table())
    for line in update.findings:
        say(line, highlight=False, markup=False)
    if sentence:
        say(sentence, highlight=False, markup=False)
    frozen = "unchanged" if update.frozen_before == update.frozen_after else "CHANGED"
    say(f"adapter digest {update.digest_after}; frozen weights {frozen} ({update.frozen_after})",
        highlight=False)
    say(f"files: {trainer.folder}/ ({', '.join(rundir.ADAPTER_FILES)}, {rundir.REPORT}, {rundir.LOG}, "
        f"{rundir.PICTURE}, {rundir.RUN}, {rundir.CHECKPOINTS}/)", highlight=False, markup=False)
    best = best_point(trainer.held_out)
    if best and 0 < best[0] < trainer.done:
        say(f"lowest held-out loss: {best[1]:.4f} after step {best[0]}; that adapter is in "
            f"{trainer.folder / rundir.BEST}/", highlight=False, markup=False)
    if trainer.ended_early():
        say(f"ended early after step {trainer.done} of {trainer.total}: {trainer.config.early_stopping_patience} "
            "evaluations brought no lower held-out loss", highlight=False, markup=False)
    elif trainer.done < trainer.total:
        say(f"stopped after step {trainer.done} of {trainer.total}, everything is saved; go on with: "
            f"{rundir.how_to_go_on(trainer.config)}", highlight=False, markup=False)
    return TrainResult(trainer.done, trainer.total, signal, update.digest_after, report, trainer.losses,
                       trainer.held_out, trainer.before, trainer.after, trainer.folder)


def _held_out(trainer: Trainer) -> dict | None:
    """Held-out loss before and after, and the paired change, in nats per supervised token."""
    before, after = trainer.before, trainer.after
    if before is None:
        return None
    change, error = paired(before, after)
    return {
        "rows": len(before.losses),
        "before": before.loss, "before_standard_error": _plain(before.standard_error),
        "after": after.loss, "after_standard_error": _plain(after.standard_error),
        "change": change, "change_standard_error": _plain(error), "course": trainer.held_out,
    }


def _plain(value: float) -> float | None:
    """JSON has no NaN: the standard error of a single row is null."""
    return value if math.isfinite(value) else None


def _totals(trainer: Trainer) -> dict:
    """Sums over the log: tokens, fill, seconds of the steps."""
    names = ("tokens", "padded_tokens", "supervised_tokens", "seconds")
    sums = {name: sum(record[name] for record in trainer.records) for name in names}
    return {**sums, "fill": sums["tokens"] / sums["padded_tokens"] if sums["padded_tokens"] else None,
            "fill_of_the_data": packing.fill_ratio(token_rows.lengths(trainer.rows), trainer.alignment)}
