"""Run the kernel or block level through pytest-benchmark, and keep a short result file of what it found."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from bench.provenance import ROOT, provenance, result_path, write_result
from fastlora.errors import InputError


def run(
    level: str, arguments: Sequence[str], output: str | None, commit: str | None, say: Callable[[str], None],
) -> int:
    """pytest's exit code; the result goes to ``output`` or to bench/results.

    Raises:
        InputError: pytest or pytest-benchmark is not installed, or pytest refused its arguments.
    """
    for package, name in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{name} is not installed; pip install '.[bench]'")
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder) / "benchmark.json"
        command = [
            sys.executable, "-m", "pytest", "-q", str(ROOT / "bench" / f"test_{level}.py"), f"--benchmark-json={found}",
            "--benchmark-columns=median,iqr,rounds,iterations", "--benchmark-sort=name", *arguments,
        ]  # fmt: skip
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, 1):
            raise InputError(f"pytest ended with {code}; its arguments were: {' '.join(arguments) or 'none'}")
        benchmarks = json.loads(found.read_text(encoding="utf-8"))["benchmarks"] if found.exists() else []
    if not benchmarks:
        say("no result: nothing was timed")
        return code
    said = provenance(commit)
    result = {"kind": level, "provenance": said, "rows": [row_of(benchmark) for benchmark in benchmarks]}
    path = pathlib.Path(output) if output else result_path(level, said)
    write_result(path, result)
    for row in result["rows"]:
        say(line(row))
    say(f"results: {path}")
    return code


def row_of(benchmark: dict) -> dict:
    """A row of a result file from a benchmark of pytest-benchmark's JSON."""
    case = benchmark["param"].removesuffix(f"-{benchmark['extra_info'].get('system', '')}")
    return {"case": case, **benchmark["extra_info"]}


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
