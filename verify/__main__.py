"""``python -m verify``: try the claims on this machine's subjects, or plant faults and see them
caught.

Exit 0: every claim that could be tried held. 1: a failure, a surviving fault, or a required word
not covered. 2: bad input, said in the last line.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from verify import own_model, report, runner
from verify.claims import CLAIMS
from verify.subject import BadSubject

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def verify(
    claim: Annotated[list[str] | None, typer.Option(help="claim to try; may be repeated")] = None,
    subject: Annotated[
        str | None, typer.Option(help="module:object, a verify.subject.Subject")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda (of the built-in subjects)")
    ] = "auto",
    budget: Annotated[str, typer.Option(help="time for all claims, such as 60s or 2m")] = "75s",
    cases: Annotated[
        int | None, typer.Option(help="cases of each claim, instead of a budget")
    ] = None,
    seed: Annotated[int, typer.Option(help="fixes the ordered list of cases")] = 0,
    require: Annotated[
        str, typer.Option(help="words that must have been tried: cuda,bf16,splits")
    ] = "",
    mutants: Annotated[
        bool, typer.Option("--mutants", help="plant faults; a survivor fails")
    ] = False,
    output: Annotated[str, typer.Option(help="where the report goes")] = "verify-report.json",
    model: Annotated[str | None, typer.Option(help="folder of your own model, for --claim splits")] = None,
    data: Annotated[str | None, typer.Option(help="your own rows (JSONL), with --model")] = None,
    splits: Annotated[
        str | None, typer.Option(help="cuts of a batch: micro-batches x sequences [1x8,2x4,8x1]")
    ] = None,
) -> None:
    """State the claims, try them, and bound every error by rounding theory."""
    names = claim or list(CLAIMS)
    for name in names:
        if name not in CLAIMS:
            raise BadSubject(f"--claim: {name!r}; allowed are {', '.join(CLAIMS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise BadSubject(f"--device: {device!r}; allowed are auto, cpu and cuda")
    if cases is not None and cases < 1:
        raise BadSubject(f"--cases: {cases}; allowed is 1 or more")
    seconds = runner.seconds_of(budget) if cases is None else None
    own = any(value is not None for value in (model, data, splits))
    if own:
        others = {"--subject": subject, "--cases": cases, "--mutants": mutants}
        cuts, names = own_model.check(model, data, splits, claim, others), ["splits"]
        subjects = []
    else:
        subjects = [runner.load_subject(subject)] if subject else _built_in(device)
    settings = {
        "claims": names,
        "subject": subject,
        "device": device,
        "budget_seconds": seconds,
        "cases": cases,
        "seed": seed,
        "require": require,
    }
    if own:
        settings |= {"model": model, "data": data, "splits": list(cuts)}
    runner.check_output(output)
    own_subject = own_model.load(model, data, device, cuts) if own else None
    console = Console()
    told = ", ".join(s.name for s in subjects) or model or "none"
    console.print(f"seed {seed}; subjects: {told}")
    outcomes, kills = [], []
    if own:
        outcomes = own_model.run(own_subject, cuts)
        report.print_claims(console, outcomes)
    elif mutants:

        def after_kill(found) -> None:
            report.write(output, report.as_dict(settings, [], found, finished=False))

        kills = runner.run_mutants(subjects, seed, after_kill)
        report.print_kills(console, kills)
    elif not subjects:
        outcomes = runner.nothing_to_run(names, f"no subject on this machine for --device {device}")
        report.print_claims(console, outcomes)
    else:

        def after_claim(found) -> None:
            report.write(output, report.as_dict(settings, found, [], finished=False))

        outcomes = runner.run_claims(
            subjects, names, seconds=seconds, cases=cases, seed=seed, after_each=after_claim
        )
        report.print_tensors(console, outcomes)
        report.print_claims(console, outcomes)
    report.write(output, report.as_dict(settings, outcomes, kills, finished=True))
    bad = runner.failed(outcomes, kills)
    if not mutants:
        words = [word.strip() for word in require.split(",") if word.strip()]
        for word in runner.missing(words, outcomes):
            console.print(f"required, and not tried on this machine: {word}")
            bad = True
    console.print(f"report: {output}")
    raise typer.Exit(1 if bad else 0)


def _built_in(device: str):
    # Imported here alone: a subject of one's own needs no fastlora.
    from verify.subjects import built_in

    return built_in(device)


def main() -> None:
    """Run the command; bad input ends in one plain line and exit 2."""
    try:
        status = app(standalone_mode=False)
    except BadSubject as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the report holds what was tried", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A usage error of the command line's parser, which some versions of typer carry inside and
        # others take from click: known by its message.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print(message(), file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
