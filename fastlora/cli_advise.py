"""``fastlora advise``: from a model's folder, and data if there are any, to a configuration and its reasons."""

from __future__ import annotations

import json
import re
import shlex
from typing import Annotated

import typer

from fastlora.errors import InputError

FORMATS = ("table", "toml", "json", "python", "command")
_UNITS = {"": 2**30, "b": 1, "mb": 10**6, "mib": 2**20, "gb": 10**9, "g": 2**30, "gib": 2**30}
# Settings that go by another name on the command line.
_FLAGS = {"r": "rank"}


def advise(
    model: Annotated[str, typer.Option("--model", help="Folder of the base model, or a hub name.")],
    data: Annotated[str | None, typer.Option("--data", help="Data to train on; its real lengths are read.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Of the card, such as 24GiB. [this machine's GPU; without one "
                                               "no limit]")] = None,
    goal: Annotated[str, typer.Option("--goal", help="general, domain or speed.")] = "general",
    rank: Annotated[int | None, typer.Option("--rank", help="A rank of your own; the rest follows.")] = None,
    new_vocabulary: Annotated[bool, typer.Option("--new-vocabulary", help="New tokens, or a language the model does not know, are "
                                                 "to be learnt.")] = False,
    output: Annotated[str, typer.Option("--output", help="Folder that the configuration names for the run.")] = "adapter",
    format: Annotated[str, typer.Option("--format", help="table, toml, json, python or command.")] = "table",
    gguf_file: Annotated[str | None, typer.Option("--gguf-file", help="GGUF file inside the model's folder.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")] = False,
) -> None:
    """Is LoRA the right tool, with which settings, and what memory and time will it take."""
    from fastlora import advise as advising
    from fastlora.config import MAX_RANK
    from fastlora.setup import load_tokenizer

    for name, value, allowed in (("goal", goal, advising.GOALS), ("format", format, FORMATS)):
        if value not in allowed:
            raise InputError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank = {rank}: allowed is an integer from 1 to {MAX_RANK}")
    card = card_bytes(memory)
    files = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    facts = {
        "goal": goal, "rank": rank, "card": card, "new_vocabulary": new_vocabulary, "model": advising.model_facts(model, **files),
        "data": data and advising.data_facts(data, load_tokenizer(model, **files)),
    }  # fmt: skip
    found = advising.decide(facts)
    if not found["fits"] and format != "table":
        raise InputError(f"memory = {memory!r}: {_too_small(found, card)}")
    places = {"model": model, "gguf_file": gguf_file, "data": data, "output": output}
    if format == "table":
        _show(facts, found, advising.cards(facts))
        return
    notes = [f"LoRA is the wrong tool here: {advising.rules()['verdicts'][name]['text']}" for name in found["verdicts"]]
    if format == "json":
        whole = found | {"notes": notes, "reasons": advising.rules()["reasons"], "sources": advising.rules()["sources"],
                         "facts": facts | {"model": facts["model"].as_dict()}, "cards": advising.cards(facts)}
        typer.echo(json.dumps(whole, indent=2))
        return
    for note in notes:
        typer.echo(f"# {note}")
    typer.echo({"toml": as_toml, "python": as_python, "command": as_command}[format](found, places), nl=False)


def card_bytes(text: str | None) -> int | None:
    """Bytes of ``--memory``; without it those of this machine's GPU, or None where there is none.

    Raises:
        InputError: no number with a unit of bytes.
    """
    if text is None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise InputError(f"memory = {text!r}: allowed is a size such as 24GiB (GiB if no unit is given)")
    return int(float(found[1]) * _UNITS[found[2]])


def as_toml(found: dict, places: dict) -> str:
    """The file that ``fastlora train --config`` reads."""
    from fastlora.rundir import toml_of

    text = "# Written by fastlora advise; fastlora train --config FILE reads it.\n"
    text += "" if places["data"] else "# No data was named: give --data beside --config.\n"
    return text + toml_of({"train": places | found["train"], "lora": found["lora"]})


def as_python(found: dict, places: dict) -> str:
    """A script that trains."""
    train = {k: v for k, v in {**places, "data": places["data"] or "YOURS.jsonl", **found["train"]}.items() if v is not None}

    def arguments(values: dict) -> str:
        return "".join(f"    {name}={value!r},\n" for name, value in values.items())

    return (
        "from fastlora import LoraConfig, TrainConfig, Trainer\nfrom fastlora.setup import load\n\n"
        f"lora = LoraConfig(\n{arguments(found['lora'])})\nconfig = TrainConfig(\n{arguments(train)})\n"
        "model, tokenizer = load(config)\nresult = Trainer(model, tokenizer, config, lora).train()\n"
    )


def as_command(found: dict, places: dict) -> str:
    """One command."""
    words = ["fastlora", "train"]
    for name, value in {**places, "data": places["data"] or "YOURS.jsonl", **found["lora"], **found["train"]}.items():
        flag = "--" + _FLAGS.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words) + "\n"


def _too_small(found: dict, card: int) -> str:
    from fastlora.advice_memory import usable
    from fastlora.advise import GIB, rules

    return (f"{found['memory']['peak'] / GIB:.1f} GiB are needed at the least, of {usable(card, rules()) / GIB:.1f} GiB that a step may "
            "take there; allowed is a larger card, or a smaller model")


def _show(facts: dict, found: dict, cards: list[dict]) -> None:
    from fastlora.advise import rules
    from fastlora.log import make_console

    console, table, data = make_console(), rules(), facts["data"]

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    if data:
        quantiles = ", ".join(f"{q} % {n}" for q, n in sorted(data["quantiles"].items(), key=lambda item: float(item[0])))
        say(f"data: {data['rows']} rows, {data['tokens']} tokens, {data['supervised']} supervised, {data['bytes_per_token']:.1f} bytes "
            f"of text a token; {data['skipped']} rows unusable")
        say(f"lengths in tokens, up to: {quantiles}")
    for name in found["verdicts"]:
        verdict = table["verdicts"][name]
        say(f"LoRA: the wrong tool. {verdict['text']} [{', '.join(table['sources'][s] for s in verdict['sources'])}]")
    if not found["verdicts"]:
        say(f"LoRA: yes. {found['lora_parameters'] / 1e6:.1f} million trained parameters; {table['goals'][facts['goal']]['why']}")
    console.print(_settings(found, table))
    if found["memory"] is None:
        say("memory: its layers do not run as fused kernels, for which alone there is a formula")
        return
    console.print(_cards(cards))
    say("Peak: weights + adapter (A, B, AdamW, exact sums) + saved activations + head or one layer's backward, in GiB. Time: at "
        f"{table['share_of_peak_rate']:.0%} of the card's dense 16-bit rate, measured on one H200 alone; other cards are assumed to "
        "reach the same share.")
    if not found["fits"]:
        say(f"This card: {_too_small(found, facts['card'])}.")
    cited = dict.fromkeys(s for reason in table["reasons"].values() for s in reason["sources"])
    for name in cited:
        say(f"[{name}] {table['sources'][name]}")


def _settings(found: dict, table: dict):
    from rich.table import Table

    shown = Table("setting", "value", "why", "source")
    values = {**found["lora"], "target_modules": "all projections", **found["train"]}
    for name, value in values.items():
        reason = table["reasons"].get({"r": "rank", "on_long_row": "max_length"}.get(name, name))
        shown.add_row(_FLAGS.get(name, name), str(value), "" if name == "on_long_row" else reason["why"],
                      "" if name == "on_long_row" else ", ".join(reason["sources"]))
    return shown


def _cards(cards: list[dict]):
    from rich.table import Table

    from fastlora.advise import GIB

    shown = Table("card", "rank", "micro-batch tokens", "checkpointing", "longest row", "weights", "adapter", "saved", "working",
                  "peak", "one epoch")
    for card in cards:
        parts = [f"{card['memory'][name] / GIB:.1f}" for name in ("weights", "adapter", "saved", "working", "peak")]
        train, seconds = card["train"], card["seconds_per_epoch"]
        took = "does not fit" if not card["fits"] else "" if seconds is None else _duration(seconds)
        shown.add_row(f"{card['gib']} GiB ({card['card']})", str(card["lora"]["r"]), str(train["micro_batch_tokens"]),
                      "every layer" if train["activation_checkpointing"] else "none", str(train["max_length"]), *parts, took)
    return shown


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
