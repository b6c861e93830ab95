"""Run the kernel or block level through pytest-benchmark, and keep a short result file of what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from bench import warm
from bench.provenance import ROOT, provenance, result_path, write_result
from fastlora.errors import InputError

# Told to pytest's process by the environment: where the result goes, and how it begins.
RESULT, HEAD = "FASTLORA_BENCH_RESULT", "FASTLORA_BENCH_HEAD"


def run(
    level: str, arguments: Sequence[str], output: str | None, commit: str | None, say: Callable[[str], None],
) -> int:
    """pytest's exit code; the result goes to ``output`` or to bench/results, a row after each test: a run cut short leaves what it found.

    Raises:
        InputError: pytest or pytest-benchmark is not installed, or pytest refused its arguments.
    """
    for package, name in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{name} is not installed; pip install '.[bench]'")
    said = provenance(commit)
    path = pathlib.Path(output).absolute() if output else result_path(level, said)
    head = {"kind": level, "provenance": said, "rows": []}
    command = [
        sys.executable, "-m", "pytest", "-q", str(ROOT / "bench" / f"test_{level}.py"),
        "--benchmark-columns=median,iqr,rounds,iterations", "--benchmark-sort=name", *arguments,
    ]  # fmt: skip
    before = path.read_bytes() if path.exists() else None
    if not arguments:  # of a chosen few, as many would be compiled for nothing
        warm.up(level, say)
    code = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {RESULT: str(path), HEAD: json.dumps(head)}).returncode
    if code not in (0, 1):
        raise InputError(f"pytest ended with {code}; its arguments were: {' '.join(arguments) or 'none'}")
    if not path.exists() or path.read_bytes() == before:
        say("no result: nothing was timed")
        return code
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        say(line(row))
    say(f"results: {path}")
    return code


class Kept:
    """The result file of a pytest session, if :func:`run` began it."""

    def __init__(self) -> None:
        self.path = os.environ.get(RESULT)
        self.result = json.loads(os.environ[HEAD]) if self.path else {}

    def add(self, case: str, found: dict) -> None:
        """Write the file anew with what one test found (its ``extra_info``), if it timed anything."""
        if self.path and found:
            self.result["rows"].append(row_of(case, found))
            write_result(self.path, self.result)


def row_of(case: str, found: dict) -> dict:
    """A row of a result file: a test's parameters in words, and what it found."""
    return {"case": case.removesuffix(f"-{found.get('system', '')}"), **found}


def line(row: dict) -> str:
    """One line for the terminal."""
    ratio, control = row["over_baseline"], row["control"]
    text = f"{row['case']:36s} {row['system']:18s} {row['time']['median_ms']:9.4f} ms  {ratio['median']:.3f} x {row['baseline']}"
    text += f" ({ratio['low']:.3f}-{ratio['high']:.3f})  A/A {control['median']:.3f}"
    if "gigabytes_per_second" in row:
        text += f"  {row['gigabytes_per_second']:.0f} GB/s"
    if "teraflops" in row:
        text += f"  {row['teraflops']:.1f} TFLOP/s"
    graph = row.get("graph", {})
    if "over_baseline" in graph:
        text += f"  graph {graph['over_baseline']['median']:.3f} x (A/A {graph['control']['median']:.3f})"
    elif graph:
        text += f"  graph {graph['not_timed']}"
    return text if control["holds_one"] else f"{text}  (the control is off: noise)"
