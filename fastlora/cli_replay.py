"""``fastlora replay``: a step of a run once more, compared with its log. Exit 0: equal, 1: different, 2: bad input."""

from __future__ import annotations

from typing import Annotated

import typer


def replay(
    run: Annotated[str, typer.Argument(help="Folder of the run.")],
    step: Annotated[int, typer.Option("--step", help="The step to compute again, counted from 1.")],
    micro_batch_tokens: Annotated[str | None, typer.Option(
        "--micro-batch-tokens", help="Most padded tokens in one forward. [the run's]")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the base model is now. [as the run had it]")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Where the data file is now. [as the run had it]")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Sequences to name.")] = 5,
) -> None:
    """Compute a step again from the nearest checkpoint, compare it with the log, name the largest gradients."""
    from fastlora import replay as replaying
    from fastlora.cli_train import micro_batch_setting
    from fastlora.log import make_console

    console = make_console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    found = replaying.replay(run, step, micro_batch_tokens=micro_batch_setting(micro_batch_tokens), model=model, data=data,
                             console=console)
    for note in found.notes:
        say(f"replay: {note}")
    say(f"replay: began {f'with the checkpoint of step {found.start}' if found.start else 'at the start of the run'}")
    shown = found.sequences[:count]
    say(f"sequences of step {step}, the {len(shown)} of {len(found.sequences)} with the largest gradients:")
    for s in shown:
        say(f"  line {s.line}  sample {s.sample_id}  gradient norm {s.gradient_norm:.4g}  loss {s.loss:.4f} "
            f"({s.supervised} supervised tokens)")
    say(found.verdict())
    if not found.equal:
        raise typer.Exit(1)
