"""Markdown tables of result files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.provenance import device_label

GIB = 2**30


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(found: dict) -> str:
    """A median ratio with its quantiles."""
    if found["low"] == found["high"]:
        return f"{found['median']:.3f}"
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def gib(found: int | None) -> str:
    """Bytes in GiB; a dash where nothing counted them."""
    return "-" if found is None else f"{found / GIB:.1f}"


def noise(rows: Iterable[dict]) -> str:
    """What the A/A controls of a table say."""
    medians = [row["control"]["median"] for row in rows if "control" in row]
    if not medians:
        return ""
    off = sum(not row["control"]["holds_one"] for row in rows if "control" in row)
    text = f"A/A controls: {min(medians):.3f} to {max(medians):.3f}"
    return text + (f"; {off} of {len(medians)} do not hold 1 within their spread" if off else ", each 1 within its spread")


def step_table(result: dict) -> str:
    """Whole models: time over the frozen one, speed and memory; then packing, caps, and what was not timed."""
    rows = [row for row in result["rows"] if "time" in row and "fits" not in row]
    full = [row for row in rows if not is_packed(row)]
    device = device_label(result["provenance"])
    head = f"**{result['shape']}**, {result['layers']} layers, random weights, {result['dtype']}, {result['tokens']} tokens a step, "
    head += f"rank {result['rank']} on all seven projections, one {device}"
    parts = [head + ":", _models(full)]
    kernels = next((row.get("attention_kernels") for row in rows if row["system"] == "frozen"), None)
    notes = [noise(rows) + "."]
    if kernels:
        notes.append(f"The frozen model's attention: {', '.join(f'`{name[:60]}`' for name in kernels[:2])}.")
    notes += [f"{text}." for text in (*derived(full), *ratio_text(result))]
    parts.append(" ".join(notes))
    packed = [row for row in rows if is_packed(row)]
    if packed:
        parts.append(packed_table(packed, result))
    fits = [row for row in result["rows"] if "fits" in row]
    if fits:
        said = [f"{named(row)} {'fits' if row['fits'] else 'does NOT fit'} {row['cap_gib']} GiB" for row in fits]
        parts.append("Allocator capped, nothing else on the device: " + "; ".join(said) + ".")
    missing = [f"{row['system']} ({row['not_timed'][:120]})" for row in result["rows"] if "not_timed" in row]
    if missing:
        parts.append("Not timed: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)


def named(row: dict, key: str = "system") -> str:
    """A row's system or case; with the commit, if it was timed at an earlier one than the rest."""
    return f"{row[key]} (at {row['commit'][:7]})" if "commit" in row else row[key]


def _over(row: dict) -> str:
    """A row's ratio by the wall clock, and that of the GPU alone, where it was replayed."""
    graph = row.get("graph", {}).get("over_baseline")
    return spread(row["over_baseline"]) + (f", GPU alone {graph['median']:.3f}" if graph else "")


def _models(rows: list[dict]) -> str:
    body = []
    for row in rows:
        speed = row["tokens"] / row["time"]["median_ms"] * 1e3
        whole = row.get("with_optimizer")
        body.append((
            named(row), f"{row['time']['median_ms']:.1f}", spread(row["over_frozen"]), f"{whole['median']:.3f}" if whole else "-",
            f"{speed:,.0f}", gib(row["peak_bytes"]), str(row.get("launches") or "-"),
        ))  # fmt: skip
    titles = ("system", "forward + backward, ms", "over frozen", "with optimiser, over frozen", "tokens/s", "peak GiB", "launches")
    return table(titles, body)


def earlier_table(result: dict) -> str:
    """Systems of others that the newest run of the same model did not time, from an earlier one, each over that run's frozen model."""
    rows = [row for row in result["rows"] if not is_packed(row)]
    return f"Systems that run did not time, in an earlier one:\n\n{_models(rows)}" if rows else ""


def is_packed(row: dict) -> bool:
    """Whether a row of a step result is about uneven short rows."""
    return bool({"rows", "library"} & set(row["system"].split("+")))


def packed_table(rows: list[dict], result: dict) -> str:
    """Short rows: what counts is supervised tokens a second."""
    body = []
    for row in rows:
        speed = row["supervised_tokens"] / row["time"]["median_ms"] * 1e3
        body.append((
            named(row), f"{row['tokens']}", f"{row['tokens'] / row['padded_tokens']:.2f}", f"{row['time']['median_ms']:.1f}",
            f"{speed:,.0f}", gib(row["peak_bytes"]),
        ))  # fmt: skip
    titles = ("uneven short rows", "real tokens", "fill", "ms", "supervised tokens/s", "peak GiB")
    fills = [
        f"{name}: " + ", ".join(f"{value:.2f} at {alignment}" for alignment, value in by.items())
        for name, by in result.get("fill", {}).items()
    ]
    return table(titles, body) + ("\n\nFill by alignment: " + "; ".join(fills) + "." if fills else "")


def derived(rows: list[dict]) -> list[str]:
    """What the targets ask about pairs of systems: the ratio turn by turn on one model, where both were timed so, else each side in units of
    the frozen model of its own session."""
    over = {row["system"]: row["over_frozen"]["median"] for row in rows}
    turns = {(row["system"], base): ratio["median"] for row in rows for base, ratio in row.get("over", {}).items()}
    pairs = (
        ("fastlora+dropout", "fastlora", "dropout 0.1 over none"), ("fastlora+r128", "fastlora", "rank 128 over the table's"),
        ("fastlora+t2048", "fastlora", "2,048 tokens over all"), ("fastlora+float", "fastlora", "float sums over exact ones"),
        ("fastlora", "peft", "over PEFT"), ("fastlora", "peft+liger", "over PEFT+Liger"), ("fastlora", "peft+compile", "over PEFT+compile"),
        ("fastlora", "frozen+compile", "over the compiled frozen model"),
        ("fastlora", "frozen+liger+compile", "over the frozen model with Liger, compiled"),
        ("fastlora+ckpt", "peft+ckpt", "checkpointed, over PEFT"), ("fastlora+ckpt", "peft+liger+ckpt", "checkpointed, over PEFT+Liger"),
        ("fastlora", "peft+liger+fp32", "over PEFT+Liger as PEFT makes adapters, in fp32"),
        ("fastlora+ckpt", "peft+liger+fp32+ckpt", "checkpointed, over PEFT+Liger as PEFT makes adapters, in fp32"),
    )  # fmt: skip
    found = [
        f"{what} {turns.get((top, base), over[top] / over[base]):.3f}" for top, base, what in pairs if top in over and base in over
    ]
    return ["fastlora: " + ", ".join(found)] if found else []


# What the exact configuration is held against, and in which words.
COSTS = {"fastlora+float": "exact over float sums, same kernels", "fastlora+nonexact": "exact over the fastest non-exact configuration"}


def costs(rows: list[dict]) -> dict[str, float]:
    """What exactness costs, by what it is held against: the ratio turn by turn on one model, where both were timed so, else of times
    over the frozen model of each one's own session."""
    over = {row["system"]: row["over_frozen"]["median"] for row in rows if "over_frozen" in row}
    turns = next((row.get("over", {}) for row in rows if row["system"] == "fastlora"), {})
    found = {}
    for name, what in COSTS.items():
        if name in turns:
            found[what] = turns[name]["median"]
        elif name in over and "fastlora" in over:
            found[what] = over["fastlora"] / over[name]
    return found


def ratio_text(result: dict) -> list[str]:
    """A sentence for each of a result's costs of exactness; none in results from before they were stored."""
    return [f"{what}: {value:.3f} x" for what, value in result.get("exact_over", {}).items()]


_SYSTEMS = ("fastlora", "fastlora-float", "fastlora-dropout", "peft", "compile", "liger")
_TITLES = ("fastlora, exact", "float sums", "dropout 0.1", "PEFT's maths", "the same compiled", "Liger")


def block_table(result: dict) -> str:
    """Blocks, forward and backward over frozen; a column a system."""
    rows = [row for row in result["rows"] if row["baseline"] == "frozen"]
    by_case: dict[str, dict] = {}
    for row in rows:
        by_case.setdefault(named(row, "case"), {})[row["system"]] = row
    body = []
    for case, found in by_case.items():
        first = next(iter(found.values()))
        cells = [_over(found[s]) if s in found else "-" for s in _SYSTEMS]
        memory = gib(found["fastlora"]["peak_bytes"]) if "fastlora" in found else "-"
        body.append((case, f"{first['baseline_time']['median_ms']:.3f}", *cells, f"{memory} / {gib(first['baseline_peak_bytes'])}"))
    if not body:
        return ""
    titles = (f"block, forward + backward, one {device_label(result['provenance'])}", "frozen ms", *_TITLES, "peak GiB, ours / frozen")
    return table(titles, body) + f"\n\nOver the frozen block. {noise(rows)}."


# The least tokens from which neither time may be above PEFT's maths.
SMALL_TARGETS = (("GPU time", 512, lambda row: row.get("graph", {})), ("Wall clock", 1024, lambda row: row))


def small_table(result: dict) -> str:
    """Small widths over PEFT's maths: by the wall clock, and by graph replay, which leaves the host out; then what is above it."""
    rows = [row for row in result["rows"] if row["baseline"] == "peft"]
    if not rows:
        return ""
    body = []
    for row in rows:
        graph = row.get("graph", {"not_timed": "not tried"})
        timed = "over_baseline" in graph
        body.append((
            row["case"], "exact" if row["system"] == "fastlora" else row["system"].removeprefix("fastlora-"),
            f"{row['baseline_time']['median_ms']:.3f}", spread(row["over_baseline"]),
            f"{graph['baseline_time']['median_ms']:.3f}" if timed else "-",
            spread(graph["over_baseline"]) if timed else graph["not_timed"],
        ))  # fmt: skip
    titles = (
        f"small widths, forward + backward, one {device_label(result['provenance'])}", "sums", "PEFT's maths, wall clock, ms",
        "ours over it", "PEFT's maths, GPU, ms", "ours over it",
    )  # fmt: skip
    graphs = [row["graph"] for row in rows if "control" in row.get("graph", {})]
    said = [f"Wall clock: {noise(rows)}.", *([f"Graph replay: {noise(graphs)}."] if graphs else []), *_above(rows)]
    return table(titles, body) + "\n\n" + " ".join(said)


def _above(rows: list[dict]) -> list[str]:
    """A sentence for each of :data:`SMALL_TARGETS` that was timed: what is above PEFT's maths."""
    found = []
    for what, least, part in SMALL_TARGETS:
        timed = [(row, part(row)["over_baseline"]["median"]) for row in rows if row["tokens"] >= least and "over_baseline" in part(row)]
        if timed:
            above = [f"{row['case']}, {row['system']} ({median:.3f})" for row, median in timed if median > 1.0]
            found.append(f"{what} above PEFT's maths from {least:,} tokens on: {'; '.join(above) or 'none'} of {len(timed)}.")
    return found


def kernel_table(result: dict) -> str:
    """Kernels over cuBLAS, a copy, or sdpa."""
    body = []
    for row in result["rows"]:
        rate = "-"
        if "teraflops" in row:
            rate = f"{row['teraflops']:.0f} TFLOP/s"
        elif "gigabytes_per_second" in row:
            rate = f"{row['gigabytes_per_second']:,.0f} GB/s, {1 / row['over_baseline']['median']:.0%} of the copy"
        case = named(row, "case") if row["system"] == "fastlora" else f"{named(row, 'case')}, {row['system']}"
        body.append((case, f"{row['time']['median_ms']:.4f}", row["baseline"], spread(row["over_baseline"]), rate))
    titles = (f"kernel, one {device_label(result['provenance'])}", "ms", "against", "over it", "rate")
    return table(titles, body) + f"\n\n{noise(result['rows'])}."


def cpu_table(result: dict) -> str:
    """The CPU step beside PEFT's."""
    body = []
    for name, found in result.items():
        if isinstance(found, dict) and "over_fastest_peft" in found:
            for system, speed in found["supervised_tokens_per_second"].items():
                seconds = found["seconds"][system]
                middle = sorted(seconds)[len(seconds) // 2]
                body.append((name, system, f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})", f"{speed:.1f}"))
    titles = (f"SmolLM2-135M's shape on {result['threads']} CPU threads, fp32", "system", "seconds a step", "supervised tokens/s")
    ratios = [f"{n}: {f['over_fastest_peft']:.3f}" for n, f in result.items() if isinstance(f, dict) and "over_fastest_peft" in f]
    return table(titles, body) + f"\n\nfastlora over the faster PEFT: {'; '.join(ratios)}. \"again\" is the A/A control."


def linear_table(result: dict) -> str:
    """The first measurements of one linear."""
    columns = ("peft maths", "exact", "exact dropout 0.1", "frozen again")
    body = [
        (f"{row['inner']} x {row['outer']}, r {row['rank']}", *(f"{row['ratios'][c]:.2f}" for c in columns)) for row in result["linear"]
    ]
    device = device_label(result["provenance"])
    titles = (f"linear (K x N, rank), one {device}", "PEFT's maths", "exact sums", "exact sums, dropout 0.1", "A/A control")
    text = table(titles, body) + "\n\nForward and backward in bf16, 8,192 tokens, wall clock over the same layer frozen."
    return text + " Taken before the fused layers; at 4096 x 4096 the host's launches set the time."


def demo_line(result: dict) -> str:
    """The demo's run."""
    demo = result["demo"]
    errors = abs(demo["change"]) / demo["change_standard_error"]
    return (
        f"The demo on one {device_label(result['provenance'])} took {demo['seconds']:.0f} s with the model on disk; held-out loss fell "
        f"from {demo['held_out_before']:.2f} to {demo['held_out_after']:.2f} ({errors:.1f} paired standard errors)."
    )
