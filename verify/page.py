"""The report as one HTML page that needs no network: tables, and histograms drawn as SVG."""

from __future__ import annotations

from html import escape

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c1c1e;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:.3rem .5rem;border-bottom:1px solid #ddd;vertical-align:top}th{background:#f3f3f5}
td.n{text-align:right;font-variant-numeric:tabular-nums}.pass,.killed{color:#0a7a33}.FAIL,.SURVIVED{color:#b00020;
font-weight:700}.not{color:#8a6100}code{font-size:12px;word-break:break-all}details{margin:.3rem 0}svg{max-width:100%}
.bar{display:inline-block;height:.6rem;background:#3b6fb6;vertical-align:middle}.frame{display:inline-block;width:9rem;
background:#e6e6ea;height:.6rem;vertical-align:middle;margin-right:.4rem}p.small{font-size:13px;color:#555}
@media(prefers-color-scheme:dark){body{background:#161618;color:#e6e6ea}th{background:#242428}th,td{border-color:#333}
.pass,.killed{color:#5fd38a}.FAIL,.SURVIVED{color:#ff7b88}.not{color:#e0b04a}.frame{background:#333}p.small{color:#aaa}}
"""


def html(report: dict) -> str:
    """The page of a report as ``verify.report.as_dict`` gives it."""
    settings, machine = report["settings"], report["machine"]
    told = {"finished": "finished", "interrupted": "interrupted: it holds what was tried until then"}
    state = told["finished"] if report["finished"] else told["interrupted"] if report["interrupted"] else "not finished"
    words = {name: " ".join(value) if isinstance(value, list | tuple) else value for name, value in settings.items()}
    asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items() if value not in (None, ""))
    on = ", ".join(f"{name} {value}" for name, value in machine.items())
    body = [
        "<h1>verify</h1>",
        f"<p>This run {escape(state)}. Asked for: {escape(asked)}.<br>Run on: {escape(on)}.</p>",
        _claims(report["claims"]),
        _histograms(report["claims"]),
        _sharpness(report["sharpness"]),
        _mutants(report["mutants"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>verify</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


def _table(heads: list[str], rows: list[list[str]], name: str) -> str:
    """Cells are HTML already; one that begins with a digit or a sign is set right."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = []
    for row in rows:
        cells = "".join(f'<td class="n">{c}</td>' if c[:1].isdigit() else f"<td>{c}</td>" for c in row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<table id="{name}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _verdict(verdict: str, reason: str = "") -> str:
    return f'<span class="{escape(verdict.split()[0])}">{escape(verdict)}</span>{escape(": " + reason if reason else "")}'


def _figure(value) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _claims(claims: list[dict]) -> str:
    if not claims:
        return ""
    rows, words = [], []
    for c in claims:
        worst = c["worst_share_of_bound"]
        share = "bits" if worst is None else _bar(worst)
        rows.append([escape(c["claim"]), escape(c["subject"]), str(c["cases"]), share if c["cases"] else "-",
                     _verdict(c["verdict"], c["reason"]), f"{c['seconds']:.1f} s"])  # fmt: skip
        lines = [f"<p>{escape(c['statement'])}</p>"]
        lines += [f"<p>{escape(note)}</p>" for note in c["notes"]]
        if c["worst_case"]:
            lines.append(f"<p>Worst case: <code>{escape(c['worst_case'])}</code></p>")
        lines += [f'<p class="FAIL">failed: <code>{escape(failure)}</code></p>' for failure in c["failures"]]
        shown = " open" if c["failures"] else ""
        words.append(f"<details{shown}><summary>{escape(c['claim'])}, {escape(c['subject'])}</summary>{''.join(lines)}</details>")
    heads = ["claim", "subject", "cases", "worst share of its bound", "verdict", "time"]
    about = (
        "<p>A claim holds if no error was larger than its bound (a share of 1), or if bits that must be equal are. "
        "<i>not tried</i> is no pass.</p>"
    )
    return f"<h2>Claims</h2>{about}{_table(heads, rows, 'claims')}{''.join(words)}"


def _bar(share) -> str:
    number = float(share)
    width = 100 * min(1.0, number) if number == number else 100
    return f'<span class="frame"><span class="bar" style="width:{width:.0f}%"></span></span>{_figure(share)}'


def _histograms(claims: list[dict]) -> str:
    drawn = [f"<h3>{escape(c['claim'])}, {escape(c['subject'])}</h3>{_svg(c['histogram'])}" for c in claims if c["histogram"]]
    if not drawn:
        return ""
    about = "<p>Elements by error as a share of their bound, on a logarithmic scale; what is right of 1 is a failure.</p>"
    return f"<h2>Errors in units of the bound</h2>{about}{''.join(drawn)}"


def _svg(histogram: dict) -> str:
    counts, wide, high = histogram["counts"], 34, 110
    total = histogram["exact"] + sum(counts)
    most = max([*counts, 1])
    bars = []
    for i, (edge, count) in enumerate(zip(histogram["edges"], counts)):
        tall = high * count / most
        colour = "#b00020" if edge is None else "#3b6fb6"
        label = "&gt;1" if edge is None else f"{edge:.2g}" if i % 4 == 0 or edge == 1 else ""
        bars.append(
            f'<rect x="{i * wide}" y="{high - tall:.1f}" width="{wide - 4}" height="{tall:.1f}" fill="{colour}">'
            f"<title>{count} elements up to {'more' if edge is None else edge}</title></rect>"
            f'<text x="{i * wide}" y="{high + 16}" font-size="10" fill="currentColor">{label}</text>'
        )
    return (
        f'<svg viewBox="0 0 {wide * len(counts)} {high + 24}" role="img">{"".join(bars)}</svg>'
        f'<p class="small">{total} elements; {histogram["exact"]} without any error</p>'
    )


def _sharpness(rows: list[dict]) -> str:
    if not rows:
        return ""
    cells = [
        [escape(r["claim"]), escape(r["what"]), escape(r["subject"]),
         *([_figure(r[n]) for n in ("used", "typical", "caught", "always", "ratio")]), escape(r["told"])]
        for r in rows
    ]  # fmt: skip
    heads = ["claim", "of", "subject", "sound: largest", "sound: typical", "caught from", "always caught from", "ratio", "planted"]
    about = "<p>In units of the bound: what a sound subject used, and the smallest planted deviation that is caught.</p>"
    return f"<h2>Sharpness</h2>{about}{_table(heads, cells, 'sharpness')}"


def _mutants(mutants: list[dict]) -> str:
    if not mutants:
        return ""
    rules = list(next((m["rules"] for m in mutants if m["rules"]), {}))
    rows = []
    for m in mutants:
        origin = m["modelled_on"]
        if origin:
            repository, _, number = origin.partition("#")
            origin = f'<a href="https://github.com/{escape(repository)}/issues/{escape(number)}">{escape(origin)}</a>'
        seen = [{True: "seen", False: "-", None: ""}[m["rules"].get(name)] for name in rules]
        told = f"<details><summary>{_verdict(m['verdict'])}</summary><code>{escape(m['told'])}</code></details>"
        rows.append([escape(m["mutant"]), escape(m["sentence"]), escape(m["group"]), escape(m["subject"]), escape(m["claim"]),
                     told, f"{m['seconds']:.1f} s", *seen, origin])  # fmt: skip
    heads = ["fault", "what is wrong", "group", "subject", "claim", "verdict", "time", *rules, "modelled on"]
    killed = sum(m["verdict"] == "killed" for m in mutants)
    tried = sum(m["verdict"] != "not tried" for m in mutants)
    about = (
        f"<p>{killed} of {tried} planted faults were caught by the claim they name; {len(mutants) - tried} cannot show here. "
        "The columns behind the time say which common tolerance rules would have seen them.</p>"
    )
    return f"<h2>Planted faults</h2>{about}{_table(heads, rows, 'mutants')}"
