"""``python -m bench``: timings on this machine, the compile gate, and the README's table made from the results.

Exit 0: done. 1: a test of the suite or the gate failed. 2: bad input, said in the last line.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

from fastlora.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=False)
_PYTEST = {"allow_extra_args": True, "ignore_unknown_options": True}

Output = Annotated[str | None, typer.Option(help="Where the JSON goes. [bench/results/<date>-<device>-<what>.json]")]
Commit = Annotated[str | None, typer.Option(help="Commit to record, for a copy of the tree without git.")]


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Measure, interleaved and beside the frozen model. Without a command: the kernel and block levels."""
    if context.invoked_subcommand is None:
        code = max(_level("kernel", [], None, None), _level("block", [], None, None))
        typer.echo("whole models: python -m bench step")
        raise typer.Exit(code)


@app.command("kernel", context_settings=_PYTEST)
def kernel(context: typer.Context, output: Output = None, commit: Commit = None) -> None:
    """Kernels against cuBLAS, or a copy of the same bytes. Further arguments go to pytest (-k, --benchmark-compare-fail)."""
    raise typer.Exit(_level("kernel", context.args, output, commit))


@app.command("block", context_settings=_PYTEST)
def block(context: typer.Context, output: Output = None, commit: Commit = None) -> None:
    """Blocks, forward and backward, against the frozen block. Further arguments go to pytest."""
    raise typer.Exit(_level("block", context.args, output, commit))


@app.command("step")
def step(
    shape: Annotated[str | None, typer.Option(help="llama-3.1-8b, llama-3.2-1b, smollm2-135m or tiny. [8b on a GPU, tiny "
                                              "on a CPU]")] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many decoder layers.")] = None,
    systems: Annotated[str | None, typer.Option(help="Comma-separated, such as fastlora,fastlora+ckpt+r64,peft+compile; see "
                                                "bench/systems.py. [a list for the shape]")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 8192,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    samples: Annotated[int, typer.Option(help="Turns of each session.")] = 5,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further system is begun.")] = 510.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    optimizer: Annotated[bool, typer.Option(help="Also time the step with the optimiser's.")] = True,
    into: Annotated[str | None, typer.Option(help="An earlier result of the same model and device, whose rows of other systems are "
                                             "kept.")] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """A whole model with random weights: fastlora, PEFT, Liger and torch.compile, each beside the frozen model."""
    from bench import step as level
    from bench.provenance import provenance, result_path

    for name, value in (("tokens", tokens), ("rank", rank), ("samples", samples), ("time_limit", time_limit)):
        if value <= 0:
            raise InputError(f"{name} = {value}: allowed is more than 0")
    place, chosen = _place(device, shape, layers)
    names = None if systems is None else [name.strip() for name in systems.split(",") if name.strip()]
    plan = level.plan_for(
        chosen, place, tokens=tokens, rank=rank, samples=samples, time_limit=time_limit, optimizer=optimizer,
        commit=commit, say=typer.echo,
    )
    if place == "cpu":
        typer.echo("no GPU: through the torch reference path; these times say nothing about the kernels")
    path = pathlib.Path(output) if output else result_path(f"step-{chosen.name}", provenance(commit))
    level.run(plan, names, path, into)
    typer.echo(f"results: {path}")


@app.command("exact")
def exact(
    shape: Annotated[str | None, typer.Option(help="As of step. [8b on a GPU, tiny on a CPU]")] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many decoder layers. [4, or all of fewer]")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Room in the exact sums' integers, and the exact gradient's error beside PEFT's, tensor by tensor."""
    from bench import exactness
    from bench.provenance import result_path, write_result

    place, chosen = _place(device, shape, layers)
    result = exactness.run(chosen.cut(min(layers or 4, chosen.layers)), place, commit=commit, say=typer.echo)
    path = pathlib.Path(output) if output else result_path(f"exactness-{chosen.name}", result["provenance"])
    write_result(path, result)
    typer.echo(f"results: {path}")


@app.command("overhead")
def overhead(
    shape: Annotated[str | None, typer.Option(help="As of step. [8b on a GPU, tiny on a CPU]")] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many decoder layers.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a step, as four rows.")] = 8192,
    steps: Annotated[int, typer.Option(help="Steps timed in the trainer: whole intervals between checkpoints.")] = 50,
    every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    output: Output = None,
    commit: Commit = None,
) -> None:
    """What the trainer adds to a step: data, logging, fingerprints and checkpoints."""
    from bench import overhead as level
    from bench.provenance import provenance, result_path, write_result
    from bench.shapes import default_dtype

    for name, value, least in (("tokens", tokens, 4 * level.ROWS), ("steps", steps, 1), ("every", every, 1)):
        if value < least:
            raise InputError(f"{name} = {value}: allowed is {least} or more")
    place, chosen = _place(device, shape, layers)
    found = level.measure(chosen, place, default_dtype(place), tokens=tokens, steps=steps, every=every)
    typer.echo(
        f"{found['trainer_ms']:.1f} ms a step in the trainer over {found['bare']['median_ms']:.1f} ms bare: "
        f"{found['trainer_over_bare']:.3f} (control {found['control']['median']:.3f})"
    )
    made = provenance(commit)
    path = pathlib.Path(output) if output else result_path(f"overhead-{chosen.name}", made)
    write_result(path, {"kind": "overhead", "shape": chosen.name, "layers": chosen.layers, "provenance": made} | found)
    typer.echo(f"results: {path}")


def _place(device: str, shape: str | None, layers: int | None):
    """(cuda or cpu, the shape asked for or that device's default)."""
    from bench.shapes import shape_named
    from fastlora.setup import choose_device

    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"device = {device!r}: allowed are auto, cuda and cpu")
    place = choose_device(device)[0].type
    return place, shape_named(shape or ("llama-3.1-8b" if place == "cuda" else "tiny"), layers)


@app.command("cpu")
def cpu(output: Output = None, commit: Commit = None) -> None:
    """A training step of SmolLM2-135M's shape on the CPU, beside PEFT's."""
    from bench.cpu_step import main as measure

    measure(output, commit)


@app.command("gate")
def gate(update: Annotated[bool, typer.Option("--update", help="Write this Triton's table instead of holding builds against it.")] = False) -> None:
    """Compile every kernel for every architecture, without a GPU, and hold the builds against limits and the committed table."""
    from bench.compile_gate import main as compile_all

    compile_all(update)


@app.command("publish")
def publish() -> None:
    """Write README's table and docs/bench.svg from the newest result of each device."""
    from bench.publish import publish as write

    for line in write():
        typer.echo(line)


def _level(name: str, arguments: list[str], output: str | None, commit: str | None) -> int:
    from bench.level import run

    return run(name, arguments, output, commit, typer.echo)


def main() -> None:
    """Run the command; bad input ends in one plain line and exit 2."""
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; results written so far are kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A usage error of the command line's parser: known by its message, whatever library it comes from.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print(f"error: {message()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
