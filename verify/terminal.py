"""What a run prints: the tables, then statements, notes and failures in full sentences."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.claims.outcome import FAIL, NOT_TRIED, PASS, Outcome
from verify.mutants.table import KILLED, SURVIVED, Kill
from verify.rules import RULES
from verify.sharpness import Sharpness

_COLOURS = {PASS: "green", FAIL: "bold red", NOT_TRIED: "yellow", KILLED: "green", SURVIVED: "bold red"}


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
        cells = o.claim, o.subject, str(o.cases), worst if o.cases else "-"
        table.add_row(*cells, _verdict(o.verdict, o.reason))
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
    """The kill table, one for each subject, with what common tolerance rules would have seen."""
    for subject in dict.fromkeys(k.subject for k in kills):
        table = Table(title=f"planted faults: {escape(subject)}", title_justify="left")
        for name in ("fault", "group", "claim", "verdict", "cases", "seconds", *RULES):
            table.add_column(name)
        rows = [k for k in kills if k.subject == subject]
        for k in rows:
            told = _verdict(k.verdict, "" if k.verdict == KILLED else k.told)
            seen = [{True: "seen", False: "-", None: ""}[k.rules.get(name)] for name in RULES]
            table.add_row(k.mutant, k.group, k.claim, told, str(k.cases), f"{k.seconds:.1f}", *seen)
        console.print(table)
        killed, tried = (
            sum(k.verdict in kinds for k in rows) for kinds in ([KILLED], [KILLED, SURVIVED])
        )
        console.print(f"{killed} of {tried} killed, {len(rows) - tried} not tried")
        judged = [k for k in rows if any(v is not None for v in k.rules.values())]
        told = ", ".join(f"{name} {sum(bool(k.rules[name]) for k in judged)}" for name in RULES)
        console.print(f"common tolerance rules would have seen, of {len(judged)}: {told}")


def print_sharpness(console: Console, rows: list[Sharpness]) -> None:
    """How small a deviation each claim catches, in units of the bound."""
    if not rows:
        return
    table = Table(title="sharpness: shares of the bound", title_justify="left")
    for name in ("claim", "of", "subject", "sound: largest", "sound: typical", "caught from", "always from", "ratio"):
        table.add_column(name)
    for row in rows:
        if row.used is None:
            table.add_row(row.claim, row.what, row.subject, "0", "0", row.told, "", "")
            continue
        figures = (row.used, row.typical, row.caught, row.always, row.ratio)
        told = ["-" if figure is None else f"{figure:.3g}" for figure in figures]
        table.add_row(row.claim, row.what, row.subject, *told)
    console.print(table)
