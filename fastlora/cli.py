"""The command line. Bad input: exit 2, one line on stderr, no traceback; a run that had to stop: exit 1."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fastlora.cli_advise import advise
from fastlora.cli_export import export
from fastlora.cli_replay import replay
from fastlora.cli_train import train
from fastlora.errors import InputError, TrainingError

app = typer.Typer(
    name="fastlora", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="LoRA fine-tuning, exact under every split of the batch.",
)
app.command()(train)
app.command()(replay)
app.command()(advise)
app.command()(export)

Model = Annotated[str, typer.Option("--model", help="Folder of the base model, or a hub name.")]
Gguf = Annotated[str | None, typer.Option("--gguf-file", help="GGUF file inside the model's folder.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")]


@app.command()
def demo(
    output: Annotated[str, typer.Option("--output", help="Folder for data, adapters and reports.")] = "demo-run",
    model: Annotated[str | None, typer.Option("--model", help="A model of your own instead.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
) -> None:
    """Train SmolLM2-135M on the docstrings of this Python's standard library, and prove what changed."""
    from fastlora.demo import run_demo

    run_demo(output, model=model, steps=steps, device=device, overwrite=overwrite)


@app.command()
def report(
    before: Annotated[str, typer.Argument(help="Folder of one adapter.")],
    after: Annotated[str, typer.Argument(help="Folder of the other.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare two adapters tensor by tensor."""
    import json

    from fastlora.log import make_console
    from fastlora.report import update_report

    found = update_report(before, after)
    if json_output:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    console = make_console()
    console.print(found.table())
    for line in (*found.findings, f"digests: {found.digest_before} before, {found.digest_after} after"):
        console.print(line, highlight=False, markup=False)


@app.command()
def data(
    file: Annotated[str, typer.Argument(help="JSONL, JSON or Parquet file, or a folder or glob of them.")],
    model: Model,
    gguf_file: Gguf = None,
    line: Annotated[list[int] | None, typer.Option("--line", help="Line to show; may be repeated.")] = None,
    count: Annotated[int, typer.Option("--count", help="Rows to show where no --line is given.")] = 1,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest row in tokens.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show rows as the model sees them, supervised tokens coloured, the shape they are taken as, and what is wrong."""
    from fastlora.log import make_console
    from fastlora.setup import load_tokenizer
    from fastlora.show import show_rows

    tokenizer = load_tokenizer(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    show_rows(file, tokenizer, max_length=max_length, lines=line, count=count, console=make_console())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text, or under the format messages one user turn.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: every line of standard input is a user turn, until it ends.")]
    = False,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Folder of the adapter; none: the base model.")]
    = None,
    gguf_file: Gguf = None,
    format: Annotated[str | None, typer.Option("--format", help="messages, prompt-completion or text. [what the "
                                               "adapter was trained on]")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt with the model, in the format its adapter was trained on, or talk to it."""
    from fastlora import generate as generating
    from fastlora import setup
    from fastlora.adapter import load_adapter

    if chat == (prompt is not None):
        raise InputError("prompt and chat: give --prompt TEXT or --chat, one of the two")
    if chat and format not in (None, "messages"):
        raise InputError(f"format = {format!r}: a chat is made of messages")
    format = "messages" if chat else format or (generating.stored_format(adapter) if adapter else None)
    place, _ = setup.choose_device(device)
    files = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    tokenizer = setup.load_tokenizer(model, **files)
    network = setup.load_model(model, dtype=setup.choose_dtype(dtype, place), device=place, **files)
    if adapter:
        load_adapter(network, adapter)
    settings = {"format": format, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
                "stream": lambda text: typer.echo(text, nl=False)}
    if prompt is not None:
        said = generating.generate(network, tokenizer, prompt, **settings)
        typer.echo()
        if not said.strip():
            typer.echo("the model wrote nothing: it ended its answer at once", err=True)
        return
    shown = "> " if sys.stdin.isatty() else ""
    for _ in generating.converse(network, tokenizer, generating.lines(sys.stdin, lambda: typer.echo(shown, nl=False)), **settings):
        typer.echo()


@app.command()
def merge(
    model: Model,
    adapter: Annotated[str, typer.Option("--adapter", help="Folder of the adapter.")],
    output: Annotated[str, typer.Option("--output", help="New folder for the merged model.")],
    gguf_file: Gguf = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto is the dtype of the model's files; float32 rounds least.")]
    = "auto",
    probe_text: Annotated[str | None, typer.Option("--probe-text", help="Text on which logits are compared. [a sentence]")]
    = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Of one safetensors file.")] = "5GB",
    trust_remote_code: Trust = False,
) -> None:
    """Write the base model with the adapter inside its weights, as a transformers folder with a certificate."""
    from fastlora import certificate
    from fastlora.export import merge_to_folder
    from fastlora.log import make_console

    folder, found = merge_to_folder(
        model, adapter, output, gguf_file=gguf_file, dtype=dtype, probe_text=probe_text or certificate.PROBE_TEXT,
        max_shard_size=max_shard_size, trust_remote_code=trust_remote_code,
    )
    console = make_console()
    console.print(found.table())
    for line in (*found.lines(), f"merged model: {folder} (all of this: {certificate.FILE})"):
        console.print(line, highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave by SystemExit."""
    try:
        app(args=arguments, prog_name="fastlora")
    except InputError as error:
        _leave(error, 2)
    except TrainingError as error:
        _leave(error, 1)
    except OSError as error:
        # A full disk or a folder taken away: what was written before is whole (see fastlora.files).
        _leave(error, 1)


def _leave(error: Exception, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
