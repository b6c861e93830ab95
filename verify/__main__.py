"""``python -m verify``: try the claims on this machine's subjects, or plant faults and see them
caught.

Exit 0: every claim that could be tried held. 1: a failure, a surviving fault, or a required word
not covered. 2: bad input, said in the last line. 130: interrupted; the report holds what was tried.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from verify import BEGUN, own_model, parallel, replay, report, runner, seeds, terminal
from verify import budget as times
from verify.claims import CLAIMS
from verify.runner import Found
from verify.subject import BadSubject

# What is left of a budget for the report.
FOR_REPORT = 0.5
# At most so much is spent on making a failing case smaller, when there is no budget.
SHRINK_SECONDS = 20.0

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
    budget: Annotated[str, typer.Option(help="time of the whole run, such as 60s or 2m")] = "2m",
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
    jobs: Annotated[
        int | None, typer.Option(help="processes that plant faults, with --mutants [one for two cores, at most 6]")
    ] = None,
    case: Annotated[
        str | None, typer.Option(help="one case as a failure prints it, with one --claim")
    ] = None,
    seeds_: Annotated[
        int | None, typer.Option("--seeds", help="this many seeds from --seed on, --cases of each claim")
    ] = None,
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
    if seeds_ is not None and seeds_ < 1:
        raise BadSubject(f"--seeds: {seeds_}; allowed is 1 or more")
    if jobs is not None and (jobs < 1 or not mutants):
        raise BadSubject(f"--jobs: {jobs}; allowed is 1 or more, with --mutants")
    if case is not None and (claim is None or len(claim) != 1):
        raise BadSubject("--case: allowed with exactly one --claim")
    single = None if case is None else replay.parse(case)
    timed = cases is None and not mutants and single is None and seeds_ is None
    seconds = times.seconds_of(budget) if timed else None
    own = any(value is not None for value in (model, data, splits))
    if own:
        others = {
            "--subject": subject, "--cases": cases, "--mutants": mutants, "--case": case, "--seeds": seeds_
        }  # fmt: skip
        cuts, names = own_model.check(model, data, splits, claim, others), ["splits"]
        subjects = []
    else:
        subjects = runner.subjects_of(subject, device)
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
    found = Found()

    def keep(finished: bool) -> str:
        return report.write_both(output, report.as_dict(settings, found, finished))

    keep(False)
    try:
        with times.terminated_like_interrupted():
            if own:
                found.outcomes += own_model.run(own_subject, cuts)
            elif single is not None:
                found.outcomes += [replay.replay(s, names[0], single, seed) for s in subjects]
            elif seeds_ is not None:
                seeds.run(subjects, names, range(seed, seed + seeds_), cases or 2, found, lambda: keep(False))
            elif mutants:
                runner.run_mutants(
                    subjects, seed, lambda _: keep(False), found, again=functools.partial(runner.subjects_of, subject, device),
                    jobs=parallel.default_jobs() if jobs is None else jobs,
                )  # fmt: skip
            elif not subjects:
                found.outcomes += runner.nothing_to_run(names, f"no subject on this machine for --device {device}")
            else:
                left = None if seconds is None else seconds - (time.monotonic() - BEGUN) - FOR_REPORT
                runner.run_claims(
                    subjects, names, seconds=left, cases=cases, seed=seed, after_each=lambda _: keep(False), found=found
                )
    except KeyboardInterrupt:
        found.interrupted = True
    terminal.print_tensors(console, found.outcomes)
    if found.outcomes or not found.kills:
        terminal.print_claims(console, found.outcomes)
    terminal.print_kills(console, found.kills)
    terminal.print_sharpness(console, found.sharpness)
    page = keep(not found.interrupted)
    bad = runner.failed(found.outcomes, found.kills)
    if not mutants:
        words = [word.strip() for word in require.split(",") if word.strip()]
        for word in runner.missing(words, found.outcomes):
            console.print(f"required, and not tried on this machine: {word}")
            bad = True
    console.print(f"report: {output}, {page}")
    if found.interrupted:
        print("interrupted; the report holds what was tried", file=sys.stderr)
        raise typer.Exit(130)
    if bad and single is None and not own:
        left = SHRINK_SECONDS if seconds is None else max(0.0, seconds * 1.05 - (time.monotonic() - BEGUN))
        _reproduce(console, found, subjects, subject, device, seed, left)
    raise typer.Exit(1 if bad else 0)


def _reproduce(console: Console, found: Found, subjects, name: str | None, device: str, seed: int, seconds: float) -> None:
    """For each claim that failed, a command that shows the smallest case found."""
    begun, failed = time.monotonic(), [o for o in found.outcomes if o.failures]
    by_name = {s.name: s for s in subjects}
    for i, outcome in enumerate(failed):
        case = replay.in_sentence(outcome.failures[0])
        if case is None or outcome.subject not in by_name:
            continue
        share = max(0.0, seconds - (time.monotonic() - begun)) / (len(failed) - i)
        small = replay.shrunk(by_name[outcome.subject], outcome.claim, case, share, seed) if share > 0 else case
        console.print("to see it again:")
        print(f"  {replay.command(name, device, outcome.claim, small)}")


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
