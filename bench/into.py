"""Results of one kind, model and kind of GPU in one file: a run that does not fit its time goes on in the next.

Each row of a step result is a ratio to the frozen model of its own session, and each row of the evidence a training run of its own, so rows of
several sessions stand beside each other; those of an earlier commit say which.
"""

from __future__ import annotations

import json
import pathlib

from bench.provenance import device_label
from fastlora.errors import InputError

# What must be equal for two results to be about one thing, by kind.
SAME = {
    "step": ("kind", "shape", "layers", "tokens", "rank", "dtype"),
    "evidence": ("kind", "quick", "alpha", "rank", "size", "dtype", "model", "parameters"),
}  # fmt: skip
NOT_DONE = ("not_timed", "not_run")


def earlier(path: str | pathlib.Path, now: dict) -> list[dict]:
    """The rows of the file that ``now``, a result without them yet, goes into, each with the commit it was measured at.

    Raises:
        InputError: no such file, or one of another model, size or device; the message names the first difference.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"into = {str(path)!r}: no such file; allowed is a result of an earlier run")
    before = json.loads(path.read_text(encoding="utf-8"))
    plain = json.loads(json.dumps(now))
    found = [(name, before.get(name), plain[name]) for name in SAME[now["kind"]]]
    found.append(("device", device_label(before["provenance"]), device_label(now["provenance"])))
    for name, was, wanted in found:
        if was != wanted:
            raise InputError(f"into = {str(path)!r}: {name} is {was} there and {wanted} now")
    commit = before["provenance"]["commit"]
    return [{"commit": commit, **row} for row in before["rows"] if not any(name in row for name in NOT_DONE)]


def marked(row: dict, commit: str) -> dict:
    """``row`` of :func:`earlier`, with its commit if that is another one."""
    return {name: value for name, value in row.items() if name != "commit" or value != commit}


def together(rows: list[dict], before: list[dict], commit: str) -> list[dict]:
    """``rows`` of this run, and of ``before`` those of systems that it did not time, marked by the commit they were timed at."""
    timed = {row["system"] for row in rows if "not_timed" not in row}
    kept = [marked(row, commit) for row in before if row["system"] not in timed]
    have = timed | {row["system"] for row in kept}
    return [row for row in rows if "not_timed" not in row] + kept + [row for row in rows if row["system"] not in have]
