"""docs/bench.svg: bars of time over the frozen model, with their quantiles; 1 is the frozen model itself."""

from __future__ import annotations

import pathlib

from bench.provenance import device_label
from bench.tables import is_packed
from fastlora.files import atomic_write


def _bars(kind: str, result: dict) -> list[tuple[str, dict]]:
    """(label, ratio) from top to bottom."""
    if kind == "step":
        rows = [row for row in result["rows"] if "time" in row and "fits" not in row and not is_packed(row)]
        return [(row["system"], row["over_frozen"]) for row in rows]
    rows = [row for row in result["rows"] if row["baseline"] == "frozen" and row["system"] in ("fastlora", "peft")]
    return [(f"{row['case']}, {row['system']}", row["over_baseline"]) for row in rows]


def draw(results: list[tuple[str, pathlib.Path, dict]], path: pathlib.Path) -> None:
    """One panel a result; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(kind, result, bars) for kind, _, result in results if (bars := _bars(kind, result))]
    # Without a fixed salt every drawing has other element names, and the file another digest.
    with matplotlib.rc_context({"svg.hashsalt": "fastlora", "svg.fonttype": "none", "font.size": 8}):
        heights = [len(bars) for _, _, bars in panels]
        figure, axes = pyplot.subplots(
            len(panels), 1, figsize=(7.5, 0.9 * len(panels) + 0.22 * sum(heights)), squeeze=False,
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        for axis, (kind, result, bars) in zip(axes[:, 0], panels):
            medians = [ratio["median"] for _, ratio in bars]
            errors = [[max(0.0, m - r["low"]) for m, (_, r) in zip(medians, bars)],
                      [max(0.0, r["high"] - m) for m, (_, r) in zip(medians, bars)]]  # fmt: skip
            colours = ["#2a6f97" if "fastlora" in label else "#b0b7bd" for label, _ in bars]
            axis.barh([label for label, _ in bars], medians, xerr=errors, color=colours, error_kw={"elinewidth": 0.8})
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.invert_yaxis()
            what = result["shape"] if kind == "step" else "blocks"
            axis.set_title(f"{what}, one {device_label(result['provenance'])}", loc="left")
            axis.set_xlabel("time over frozen, forward + backward (less is better)")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)
