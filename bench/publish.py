"""README's figures and table, made from the newest result of each device: no number is typed by hand.

``bench/results`` is read; what stands between ``<!-- bench -->`` and ``<!-- /bench -->`` in README.md is replaced, and docs/bench.svg
is drawn where whole models or blocks were timed. The same results give the same bytes.
"""

from __future__ import annotations

import json
import pathlib
import re

from bench.provenance import RESULTS, ROOT, device_label
from bench.tables import (
    block_table,
    cpu_table,
    demo_line,
    earlier_table,
    kernel_table,
    linear_table,
    small_table,
    step_table,
)
from fastlora.errors import InputError
from fastlora.files import atomic_write_text

README, FIGURE = ROOT / "README.md", ROOT / "docs" / "bench.svg"
MARKS = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)
# In README's order: whole models, blocks, kernels, the CPU, and the first measurements of a device that has nothing newer.
ORDER = ("step", "block", "kernel", "cpu-step", "linear", "demo")


def kind_of(result: dict) -> str:
    """What a result file holds; the first ones say it by their keys alone."""
    if "kind" in result:
        return result["kind"]
    known = [kind for kind, key in (("linear", "linear"), ("demo", "demo"), ("cpu-step", "demo rows")) if key in result]
    return known[0] if known else "unknown"


def newest(folder: pathlib.Path) -> list[tuple[str, pathlib.Path, dict]]:
    """(kind, path, result) of the newest result of each kind, device and shape, in README's order; other kinds are passed over.

    Raises:
        InputError: a file that is no result.
    """
    found: dict[tuple, tuple[str, pathlib.Path, dict]] = {}
    earlier: dict[tuple, list[tuple[str, pathlib.Path, dict]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            date = result["provenance"]["date"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path.name}: it is no result of this suite ({type(error).__name__}: {error})") from error
        kind = kind_of(result)
        if kind not in ORDER:
            continue  # some other measurement: kept, and not the README's business
        key = kind, device_label(result["provenance"]), result.get("shape"), result.get("layers")
        if key not in found or found[key][2]["provenance"]["date"] <= date:
            if key in found:
                earlier.setdefault(key, []).append(found[key])
            found[key] = kind, path, result
        else:
            earlier.setdefault(key, []).append((kind, path, result))
    measured = {device for kind, device, *_ in found if kind == "block"}
    kept = [entry for key, entry in found.items() if not (key[0] == "linear" and key[1] in measured)]
    for key, entries in earlier.items():
        if key[0] == "step":
            kept += _peers_alone(sorted(entries, key=lambda entry: entry[2]["provenance"]["date"], reverse=True), found[key][2])
    # The largest model first: it is what the figures above the fold are about.
    return sorted(kept, key=lambda e: (ORDER.index(e[0]), -_size(e[2]), "peers" in e[2], device_label(e[2]["provenance"]), e[1].name))


def _peers_alone(entries: list[tuple[str, pathlib.Path, dict]], newest: dict) -> list[tuple[str, pathlib.Path, dict]]:
    """Earlier results of whole models, the latest first, with the systems of others that no later one timed; those with none are left out.
    Ours are left out too: they have changed since."""
    timed, kept = {row["system"] for row in newest["rows"] if "time" in row}, []
    for kind, path, result in entries:
        rows = [row for row in result["rows"] if "time" in row and not row["system"].startswith("fastlora") and row["system"] not in timed]
        timed |= {row["system"] for row in rows}
        if rows:
            kept.append((kind, path, {**result, "rows": rows, "peers": True}))
    return kept


def _size(result: dict) -> int:
    from bench.shapes import SHAPES

    shape = SHAPES.get(result.get("shape"))
    return 0 if shape is None else shape.hidden * result.get("layers", shape.layers)


TABLES = {
    "step": (step_table,), "block": (block_table, small_table), "kernel": (kernel_table,), "cpu-step": (cpu_table,),
    "linear": (linear_table,), "demo": (demo_line,),
}  # fmt: skip


def text_of(results: list[tuple[str, pathlib.Path, dict]]) -> str:
    """What goes between the marks."""
    parts = []
    if _drawable(results):
        parts.append("![Time over the frozen model](docs/bench.svg)")
    for kind, path, result in results:
        tables = [text for make in ((earlier_table,) if "peers" in result else TABLES[kind]) if (text := make(result))]
        if tables:
            dirty = " (with changes that were not committed)" if result["provenance"].get("dirty") else ""
            source = f"From `bench/results/{path.name}`, commit {result['provenance']['commit'][:9]}{dirty}."
            parts += [*tables, source]
    return "\n\n".join(parts) + "\n"


def _drawable(results: list[tuple[str, pathlib.Path, dict]]) -> list[tuple[str, pathlib.Path, dict]]:
    return [entry for entry in results if entry[0] in ("step", "block") and "peers" not in entry[2]]


def publish(
    folder: pathlib.Path = RESULTS, readme: pathlib.Path = README, figure: pathlib.Path = FIGURE,
) -> list[str]:
    """Rewrite README's part and the figure; returns what was done, a line each.

    Raises:
        InputError: README has no marks, or a file of the folder is no result.
    """
    results = newest(folder)
    before = readme.read_text(encoding="utf-8")
    if len(MARKS.findall(before)) != 1:
        raise InputError(f"{readme.name}: allowed is one part between <!-- bench --> and <!-- /bench -->")
    after = MARKS.sub(lambda match: match[1] + text_of(results) + match[2], before)
    done = [f"{readme.name}: from {', '.join(path.name for _, path, _ in results) or 'nothing'}"]
    if _drawable(results):
        from bench.figure import draw

        draw(_drawable(results), figure)
        done.append(f"{figure.name}: drawn")
    if after != before:
        atomic_write_text(readme, after)
    else:
        done[0] += ", unchanged"
    return done
