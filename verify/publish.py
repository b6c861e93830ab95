"""``python -m verify.publish REPORT``: write the kill table of a ``--mutants`` report into ``docs/faults.md``."""

from __future__ import annotations

import json
import pathlib
import sys

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "faults.md"
HEAD = """# Planted faults

Written by `python -m verify.publish` from a run of `python -m verify --mutants`; [verification.md](verification.md) explains the
columns. {killed} of {tried} killed; {rest} cannot show on this subject. {subject}; {machine}.

Tolerance rules that would have seen them, of {judged}: {rules}.
"""


def page(report: dict) -> str:
    """The page for a report; rows of the first subject, in the order of the groups.

    Raises:
        ValueError: the report has no planted faults, or did not finish.
    """
    if not report["mutants"] or not report["finished"]:
        raise ValueError("allowed is the report of a finished run of --mutants")
    subject = report["mutants"][0]["subject"]
    rows = [m for m in report["mutants"] if m["subject"] == subject]
    names = list(next(m["rules"] for m in rows if m["rules"]))
    judged = [m for m in rows if any(value is not None for value in m["rules"].values())]
    killed, tried = (sum(m["verdict"] in kinds for m in rows) for kinds in (["killed"], ["killed", "SURVIVED"]))
    head = HEAD.format(
        killed=killed, tried=tried, rest=len(rows) - tried, subject=subject, judged=len(judged),
        machine=", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        rules=", ".join(f"{name} {sum(bool(m['rules'][name]) for m in judged)}" for name in names),
    )  # fmt: skip
    lines = [head]
    for group in dict.fromkeys(m["group"] for m in rows):
        heads = ["fault", "what is wrong", "claim", "verdict", "seen on", *names, "modelled on"]
        lines += [f"\n## {group.capitalize()}\n", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for m in (m for m in rows if m["group"] == group):
            seen = [{True: "seen", False: "-", None: ""}[m["rules"].get(name)] for name in names]
            cells = [m["mutant"], m["sentence"], f"`{m['claim']}`", m["verdict"], ", ".join(m["seen_on"]), *seen, _link(m)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _link(mutant: dict) -> str:
    repository, _, number = mutant["modelled_on"].partition("#")
    return f"[{mutant['modelled_on']}](https://github.com/{repository}/issues/{number})" if number else ""


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
