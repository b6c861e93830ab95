"""The terminal tables and ``verify-report.json``, written whole or not at all.

The JSON is the same for the same seed and number of cases, but for the fields called ``seconds``.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import tempfile

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.claims.outcome import FAIL, NOT_TRIED, PASS, Outcome
from verify.mutants.table import KILLED, SURVIVED, Kill

SCHEMA = 1
_COLOURS = {
    PASS: "green",
    FAIL: "bold red",
    NOT_TRIED: "yellow",
    KILLED: "green",
    SURVIVED: "bold red",
}


def machine() -> dict[str, str]:
    """Versions and devices that the results belong to."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def as_dict(settings: dict, outcomes: list[Outcome], kills: list[Kill], finished: bool) -> dict:
    """The report as plain data."""
    return {
        "schema": SCHEMA,
        "settings": settings,
        "machine": machine(),
        "finished": finished,
        "claims": [
            {
                "claim": o.claim,
                "statement": o.statement,
                "subject": o.subject,
                "cases": o.cases,
                "worst_share_of_bound": _number(o.worst),
                "worst_case": o.worst_case,
                "verdict": o.verdict,
                "reason": o.reason,
                "failures": o.failures,
                "notes": o.notes,
                "tensors": o.rows,
                "tried_on": sorted(o.tags),
                "seconds": round(o.seconds, 3),
            }
            for o in outcomes
        ],
        "mutants": [{**k.__dict__, "seconds": round(k.seconds, 3)} for k in kills],
    }


def write(path: str | os.PathLike, content: dict) -> None:
    """Write JSON beside ``path`` and rename it over: an interrupt leaves the old or the new one."""
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        pathlib.Path(name).chmod(0o644)
        pathlib.Path(name).replace(path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def _verdict(verdict: str, reason: str = "") -> str:
    told = f"{verdict}: {reason}" if reason else verdict
    return f"[{_COLOURS.get(verdict, 'yellow')}]{escape(told)}[/]"


def print_claims(console: Console, outcomes: list[Outcome]) -> None:
    """The table of claims, then statements, notes and failures in full sentences."""
    table = Table(title="claims", title_justify="left")
    for name in ("claim", "subject", "cases", "worst share of its bound", "verdict"):
        table.add_column(name, justify="right" if name == "cases" else "left")
    for o in outcomes:
        worst = "bits" if o.worst is None else f"{o.worst:.3g}"
        table.add_row(
            o.claim,
            o.subject,
            str(o.cases),
            worst if o.cases else "-",
            _verdict(o.verdict, o.reason),
        )
    console.print(table)
    told = set()
    for o in outcomes:
        if o.claim not in told:
            console.print(f"[bold]{o.claim}[/]: {escape(o.statement)}")
            told.add(o.claim)
        for note in o.notes:
            console.print(f"  {escape(o.subject)}: {escape(note)}")
        for failure in o.failures:
            console.print(f"  [bold red]failed[/]: {escape(failure)}")


def print_tensors(console: Console, outcomes: list[Outcome]) -> None:
    """What one training of the updates claim changed, a row for each adapter tensor."""
    rows = next((o.rows for o in outcomes if o.rows), None)
    if rows is None:
        return
    table = Table(title="one training: adapter tensors before and after", title_justify="left")
    for name in ("tensor", "MD5 before", "after", "sum |diff|", "largest", "changed"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(
            _short(row["name"]), row["md5_before"][:8], row["md5_after"][:8],
            f"{row['sum_abs_diff']:.4g}", f"{row['max_abs_diff']:.3g}", f"{row['share_changed']:.1%}",
        )  # fmt: skip
    console.print(table)


def _short(name: str) -> str:
    """``model.layers.0.self_attn.q_proj.lora_A.weight`` as ``0.q_proj.A``; the JSON has it whole."""
    for part in ("model.layers.", "self_attn.", "mlp.", "lora_", ".weight"):
        name = name.replace(part, "")
    return name


def print_kills(console: Console, kills: list[Kill]) -> None:
    """The kill table, one for each subject."""
    for subject in dict.fromkeys(k.subject for k in kills):
        table = Table(title=f"planted faults: {escape(subject)}", title_justify="left")
        for name in ("fault", "claim", "verdict", "cases", "seconds"):
            table.add_column(name)
        rows = [k for k in kills if k.subject == subject]
        for k in rows:
            told = _verdict(k.verdict, "" if k.verdict == KILLED else k.told)
            table.add_row(k.mutant, k.claim, told, str(k.cases), f"{k.seconds:.1f}")
        console.print(table)
        killed, tried = (
            sum(k.verdict in kinds for k in rows) for kinds in ([KILLED], [KILLED, SURVIVED])
        )
        console.print(f"{killed} of {tried} killed, {len(rows) - tried} not tried")
