"""``verify-report.json`` and the page beside it, written whole or not at all.

The JSON is the same for the same seed and number of cases, but for the fields called ``seconds``. Its fields are listed in
``docs/verification.md``; ``schema`` grows by one when one of them changes its meaning or goes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import tempfile

import torch

from verify import page
from verify.claims.outcome import Outcome
from verify.histogram import Histogram
from verify.runner import Found

SCHEMA = 2


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


def as_dict(settings: dict, found: Found, finished: bool) -> dict:
    """The report as plain data."""
    return {
        "schema": SCHEMA,
        "settings": settings,
        "machine": machine(),
        "finished": finished,
        "interrupted": found.interrupted,
        "claims": [_claim(o, found.histograms.get((o.claim, o.subject))) for o in found.outcomes],
        "mutants": [{**k.__dict__, "seen_on": list(k.seen_on), "seconds": round(k.seconds, 3)} for k in found.kills],
        "sharpness": [{**s.__dict__, **{n: _number(s.__dict__[n]) for n in ("used", "typical", "caught", "always")},
                       "ratio": _number(s.ratio)} for s in found.sharpness],
    }  # fmt: skip


def _claim(o: Outcome, histogram: Histogram | None) -> dict:
    return {
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
        "histogram": histogram.as_dict() if histogram is not None and histogram.total else None,
        "seconds": round(o.seconds, 3),
    }


def write_both(path: str, content: dict) -> str:
    """The JSON at ``path`` and the page beside it; the page's path."""
    write(path, content)
    beside = pathlib.Path(path).with_suffix(".html")
    _write_text(beside, page.html(content))
    return str(beside)


def write(path: str | os.PathLike, content: dict) -> None:
    """Write JSON beside ``path`` and rename it over: an interrupt leaves the old or the new one."""
    _write_text(pathlib.Path(path), json.dumps(content, indent=1, sort_keys=True) + "\n")


def _write_text(path: pathlib.Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        pathlib.Path(name).chmod(0o644)
        pathlib.Path(name).replace(path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
