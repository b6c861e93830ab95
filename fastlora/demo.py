"""The demo: from nothing to a trained adapter on a real model and real text, with the proof of what changed."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastlora import demo_data, demo_model, rundir
from fastlora.config import LoraConfig
from fastlora.errors import InputError
from fastlora.evaluate import paired
from fastlora.files import atomic_write_text
from fastlora.generate import generate
from fastlora.inject import eject
from fastlora.log import make_console
from fastlora.packing import padded_length
from fastlora.setup import choose_device, choose_dtype, load_model, load_tokenizer
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig

HELD_OUT_ROWS = 64
BATCH, STEPS = 8, 20
# Steps that are trained again with another cut of each batch.
CHECKED_STEPS = 2
EXAMPLES, NEW_TOKENS = 3, 32
FORMAT = "prompt-completion"


def run_demo(output: str, *, model: str | None = None, steps: int | None = None, device: str = "auto",
             overwrite: bool = False, console: Console | None = None) -> dict:
    """Train r = 16 on all seven projections of SmolLM2-135M with this Python's docstrings, and say what came out.

    Args:
        output: folder for data, the run, and ``demo.json``. model: a model folder of your own instead of the download.
        steps: optimiser steps. device: "auto", "cuda" or "cpu". overwrite: replace an earlier demo there.

    Returns:
        What ``demo.json`` holds.

    Raises:
        InputError: the folder holds another run, no network for the download, a bad argument. TrainingError: see Trainer.
    """
    started = time.perf_counter()
    console = console or make_console()
    say = console.print
    folder = pathlib.Path(output)
    if rundir.holds_run(folder / "run") and not overwrite:
        raise InputError(f"output = {output!r}: it holds an earlier demo; allowed are --overwrite, or another folder")
    steps = STEPS if steps is None else steps
    if steps < CHECKED_STEPS:
        raise InputError(f"steps = {steps}: allowed is at least {CHECKED_STEPS}, which are trained twice for comparison")
    place, note = choose_device(device)
    if note:
        say(note)
    source = model or str(demo_model.fetch(say=say))
    tokenizer = load_tokenizer(source)
    say("loading the model")
    network = load_model(source, dtype=choose_dtype("auto", place), device=place)
    data = demo_data.write(
        folder / "data", train_rows=BATCH * steps, held_out_rows=HELD_OUT_ROWS,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
    )  # fmt: skip
    say(f"data: {data.train_rows} functions of this Python's standard library to train on, {data.held_out_rows} held out, "
        "from modules that are not trained on; the model reads a function without its docstring and writes the docstring")
    shown = _examples(data.held_out)
    before = [_written(network, tokenizer, row["prompt"]) for row in shown]
    settings = {"model": source, "data": str(data.train), "eval_data": str(data.held_out), "batch_size": BATCH,
                "steps": steps, "learning_rate": 1e-3, "eval_every": steps, "digest_every": CHECKED_STEPS,
                "device": device}  # fmt: skip
    config = TrainConfig(**settings, output=str(folder / "run"), overwrite=overwrite)
    trainer = Trainer(network, tokenizer, config, LoraConfig(), console=console)
    result = trainer.train()
    if result.signal is not None:
        return {}
    after = [_written(network, tokenizer, row["prompt"]) for row in shown]
    _show_examples(console, shown, before, after)
    change, error = paired(result.before, result.after)
    say(f"held-out loss: {result.before.loss:.4f} before, {result.after.loss:.4f} after ({change / result.before.loss:+.1%}), "
        f"{abs(change) / error:.1f} paired standard errors over {len(result.before.losses)} functions")
    checked = _other_cuts(network, tokenizer, settings, folder, trainer, result)
    _show_cuts(console, checked)
    seconds = time.perf_counter() - started
    summary = {
        "held_out_before": result.before.loss, "held_out_after": result.after.loss, "change": change,
        "change_standard_error": error if math.isfinite(error) else None, "digest": result.digest, "steps": steps,
        "cuts": checked, "seconds": seconds, "device": str(place), "versions": rundir.versions(),
        "examples": [{"real": row["completion"], "before": b, "after": a} for row, b, a in zip(shown, before, after)],
    }
    atomic_write_text(folder / "demo.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    say(f"done in {seconds:.0f} s. Adapter, report, log and loss.png lie in {folder / 'run'}/, this summary in "
        f"{folder / 'demo.json'}.", markup=False)
    say("Next: train on a file of your own, one JSON object a line with prompt and completion, messages, conversations, instruction "
        "and output, or text:", markup=False)
    call = rundir.own_command()
    say(f"  {call} train --model {source} --data YOURS.jsonl --output my-adapter", markup=False)
    say(f"  {call} generate --model {source} --adapter {folder / 'run'} --prompt 'def add(a, b): ...'", markup=False)
    return summary


def _examples(held_out: pathlib.Path) -> list[dict]:
    """The first rows of the held-out file, whose order is by a hash: nobody chose them."""
    lines = held_out.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:EXAMPLES]]


def _written(network, tokenizer, prompt: str) -> str:
    return generate(network, tokenizer, prompt, format=FORMAT, max_new_tokens=NEW_TOKENS).strip()


def _show_examples(console: Console, shown: Sequence[dict], before: Sequence[str], after: Sequence[str]) -> None:
    table = Table(title=f"the first {len(shown)} held-out functions (greedy, at most {NEW_TOKENS} tokens)", show_lines=True)
    for column in ("function", "before", "after", "real docstring"):
        table.add_column(column, overflow="fold", ratio=1)
    for row, old, new in zip(shown, before, after):
        lines = [line.strip() for line in row["prompt"].splitlines()]
        name = next((line for line in lines if line.startswith(("def ", "async def "))), lines[0])
        table.add_row(*(_plain(text) for text in (name, old, new, row["completion"].strip())))
    console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _other_cuts(network, tokenizer, settings: dict, folder: pathlib.Path, trainer: Trainer, result) -> list[dict]:
    """The first steps again: one sequence a micro-batch, then both cuts with float sums as a control."""
    limit = trainer.limit
    single = max(padded_length(len(row), trainer.alignment) for row in trainer.rows)
    found = [_row("exact", "as trained", result.log[:CHECKED_STEPS])]
    for sums, name, tokens in (("exact", "other cut", single), ("float", "as trained", limit), ("float", "other cut", single)):
        eject(network)
        config = TrainConfig(**{**settings, "eval_data": None}, micro_batch_tokens=tokens, overwrite=True,
                             output=str(folder / "checks" / f"{sums}-{name.replace(' ', '-')}"))  # fmt: skip
        again = Trainer(network, tokenizer, config, LoraConfig(), console=Console(quiet=True), float_sums=sums == "float")
        found.append(_row(sums, name, again.train(stop_after=CHECKED_STEPS).log))
    return found


def _row(sums: str, cut: str, log: Sequence[dict]) -> dict:
    return {"sums": sums, "cut": cut, "micro_batches": [len(record["micro_batches"]) for record in log],
            "fingerprints": [record["fingerprint"] for record in log], "digest": log[-1]["digest"]}  # fmt: skip


def _show_cuts(console: Console, checked: Sequence[dict]) -> None:
    table = Table(title=f"the first {CHECKED_STEPS} steps, each global batch cut in two ways")
    for column in ("sums", "cut", "micro-batches a step", f"MD5 of the adapter after step {CHECKED_STEPS}"):
        table.add_column(column)
    for row in checked:
        table.add_row(row["sums"], row["cut"], ", ".join(map(str, row["micro_batches"])), row["digest"])
    console.print(table)
    last = {sums: {row["digest"] for row in checked if row["sums"] == sums} for sums in ("exact", "float")}
    same = "the same bytes" if len(last["exact"]) == 1 else "DIFFERENT bytes"
    control = "different ones, as everywhere else" if len(last["float"]) > 1 else "the same here, by chance"
    console.print(f"exact sums: {same} for both cuts; float sums: {control}")
