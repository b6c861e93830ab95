"""``python -m bench.evidence_page``: the tables and the figure of docs/advice.md, made from the newest result of ``bench.evidence``.

What stands between the marks is replaced; without a result it says how to make one. The same result gives the same bytes.
"""

from __future__ import annotations

import json
import pathlib
import re

from bench.provenance import RESULTS, ROOT, device_label
from fastlora.files import atomic_write, atomic_write_text

PAGE, FIGURE = ROOT / "docs" / "advice.md", ROOT / "docs" / "advice.svg"
MARKS = re.compile(r"(<!-- bench: evidence -->\n).*?(<!-- /bench: evidence -->)", re.DOTALL)
NOTHING = "No result is committed yet: `python -m bench.evidence --model DIR` makes one, on a GPU in minutes.\n"


def newest(folder: pathlib.Path = RESULTS) -> tuple[str, dict] | None:
    """(file name, result) of the evidence to show: whole runs before quick ones, then the latest."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("kind") == "evidence":
            found.append((not result["quick"], result["provenance"]["date"], path.name, result))
    return max(found, key=lambda entry: entry[:3])[2:] if found else None


def text_of(found: tuple[str, dict] | None) -> str:
    """What goes between the marks."""
    if found is None:
        return NOTHING
    name, result = found
    rows = [row for row in result["rows"] if "not_run" not in row]
    size = result["size"]
    parts = [
        f"{result['parameters'] / 1e6:.0f} million parameters, {result['dtype']}, one {device_label(result['provenance'])}; batches of "
        f"{size['batch']}, {size['held_out']} functions held out. {'A quick run: few steps, of little weight.' if result['quick'] else ''}".strip(),
        _what([row for row in rows if row["question"] == "what"], result["rank"]),
        _ranks([row for row in rows if row["question"] == "rank"], result["alpha"]),
    ]
    if _ladder(result):
        parts.append("![Gradient norm and held-out loss by rank](advice.svg)")
    missing = len(result["rows"]) - len(rows)
    earlier = sorted({row["commit"][:9] for row in rows if "commit" in row})
    older = sum("commit" in row for row in rows)
    parts.append(f"From `bench/results/{name}`, commit {result['provenance']['commit'][:9]}"
                 + (f"; {older} of its {len(rows)} runs at {', '.join(earlier)}" if older else "")
                 + (f"; {missing} runs of the plan fell to the time limit." if missing else "."))
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(rows: list[dict], rank: int) -> str:
    if not rows:
        return ""
    lines = [f"LoRA of rank {rank} against all weights, {rows[0]['steps']} steps. Loss in nats a supervised token, ± the paired standard "
             "error of the change; memory is torch's peak.", "",
             "| | learning rate | trained parameters | held-out before | after | change | peak |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peak = "not counted on a CPU" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"| {row['system']} | {row['learning_rate']:g} | {row['trained_parameters'] / 1e6:.1f} M | {row['held_out_before']:.3f} "
                     f"| {row['held_out_after']:.3f} | {row['change']:+.3f} ± {row['change_standard_error']:.3f} | {peak} |")
    return "\n".join(lines)


def _ranks(rows: list[dict], alpha: int) -> str:
    if not rows:
        return ""
    lines = [f"LoRA (s = alpha / r) and rsLoRA (s = alpha / sqrt r), alpha {alpha} at every rank, learning rate {rows[0]['learning_rate']:g}, "
             f"{rows[0]['steps']} steps. Gradient norm: the mean over the second half of the steps.", "",
             "| rank | scaling | s | gradient norm | held-out after |", "|---|---|---|---|---|"]
    for row in rows:
        scale = alpha / (row["rank"] ** 0.5 if row["system"] == "rsLoRA" else row["rank"])
        lines.append(f"| {row['rank']} | {row['system']} | {scale:.3g} | {row['grad_norm']:.3g} | {row['held_out_after']:.4f} |")
    return "\n".join(lines)


def _ladder(result: dict) -> dict[str, list[dict]]:
    """Rows by scaling, where there are several ranks."""
    rows = [row for row in result["rows"] if row["question"] == "rank" and "not_run" not in row]
    found = {name: [row for row in rows if row["system"] == name] for name in ("LoRA", "rsLoRA")}
    return found if all(len(kept) > 1 for kept in found.values()) else {}


def draw(result: dict, path: pathlib.Path) -> None:
    """Gradient norm and held-out loss over the rank; the same result gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "fastlora", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.5, 2.6), layout="constrained")
        for name, colour in (("LoRA", "#b0b7bd"), ("rsLoRA", "#2a6f97")):
            rows = _ladder(result)[name]
            for axis, key in zip(axes, ("grad_norm", "held_out_after")):
                axis.plot([row["rank"] for row in rows], [row[key] for row in rows], "o-", color=colour, label=name)
        for axis, label in zip(axes, ("gradient norm", "held-out loss (nats a token)")):
            axis.set_xscale("log", base=2)
            axis.set_xlabel("rank")
            axis.set_ylabel(label)
        axes[0].set_yscale("log")
        axes[0].legend(frameon=False)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Rewrite the page's part and the figure."""
    found = newest()
    before = PAGE.read_text(encoding="utf-8")
    atomic_write_text(PAGE, MARKS.sub(lambda match: match[1] + text_of(found) + match[2], before))
    if found is not None and _ladder(found[1]):
        draw(found[1], FIGURE)
    print(f"{PAGE.name}: from {found[0] if found else 'nothing'}")


if __name__ == "__main__":
    main()
