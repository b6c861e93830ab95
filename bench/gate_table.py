"""The committed table of what the compiler made of each kernel, by Triton version, and what differs from it.

``bench/gate/triton-<version>.json`` holds a line a case. The compile gate and CI hold new builds against the table of
the Triton they run with; ``python -m bench gate --update`` writes it anew, and the difference is then read in review. For a version without a
table only the architectures' limits hold.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from fastlora.files import atomic_write_text

FOLDER = pathlib.Path(__file__).parent / "gate"


def path_of(version: str) -> pathlib.Path:
    """Where the table of a Triton version lies."""
    return FOLDER / f"triton-{version}.json"


def load(version: str) -> dict[str, dict[str, int]] | None:
    """Case name -> figures, or None where this version has no table."""
    path = path_of(version)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(version: str, reports: dict) -> pathlib.Path:
    """Replace the version's table by these reports, sorted by name, a line each."""
    FOLDER.mkdir(exist_ok=True)
    lines = [f" {json.dumps(name)}: {json.dumps(dataclasses.asdict(reports[name]))}" for name in sorted(reports)]
    atomic_write_text(path_of(version), "{\n" + ",\n".join(lines) + "\n}\n")
    return path_of(version)


def difference(name: str, report, table: dict[str, dict[str, int]] | None) -> str:
    """What a new build has otherwise than the table, as one line; empty for none, and without a table."""
    if table is None:
        return ""
    if name not in table:
        return f"{name}: not in the table"
    new, old = dataclasses.asdict(report), table[name]
    parts = [f"{what} {old.get(what)} -> {value}" for what, value in new.items() if value != old.get(what)]
    return f"{name}: {', '.join(parts)}" if parts else ""
