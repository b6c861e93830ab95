"""Step results of one model on one kind of GPU in one file: a run that does not fit its time goes on in the next.

Each row is a ratio to the frozen model of its own session, so rows of several sessions stand beside each other; those of an earlier commit
say which.
"""

from __future__ import annotations

import json
import pathlib

from bench.provenance import device_label
from fastlora.errors import InputError

# What must be equal for two results to be about one thing.
SAME = ("kind", "shape", "layers", "tokens", "rank", "dtype")


def earlier(path: str | pathlib.Path, now: dict) -> list[dict]:
    """The timed rows of the file that ``now``, a result without them yet, goes into.

    Raises:
        InputError: no such file, or one of another model, size or device; the message names the first difference.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"into = {str(path)!r}: no such file; allowed is a result of bench step")
    before = json.loads(path.read_text(encoding="utf-8"))
    found = [(name, before.get(name), now[name]) for name in SAME]
    found.append(("device", device_label(before["provenance"]), device_label(now["provenance"])))
    for name, was, wanted in found:
        if was != wanted:
            raise InputError(f"into = {str(path)!r}: {name} is {was} there and {wanted} now")
    commit = before["provenance"]["commit"]
    return [{"commit": commit, **row} for row in before["rows"] if "not_timed" not in row]


def together(rows: list[dict], before: list[dict], commit: str) -> list[dict]:
    """``rows`` of this run, and of ``before`` those of systems that it did not time, marked by the commit they were timed at."""
    timed = {row["system"] for row in rows if "not_timed" not in row}
    kept = [dict(row) for row in before if row["system"] not in timed]
    for row in kept:
        if row["commit"] == commit:
            del row["commit"]
    have = timed | {row["system"] for row in kept}
    return [row for row in rows if "not_timed" not in row] + kept + [row for row in rows if row["system"] not in have]
