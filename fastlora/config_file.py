"""The file of ``fastlora train --config``: settings by name, written by hand, by ``fastlora advise``, or by an earlier run.

    [train]     fields of TrainConfig       [lora]     fields of LoraConfig, or what a run wrote

A ``run.toml`` holds more tables, which describe the run and set nothing: ``data``, ``versions``, ``made_of``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib

from fastlora.config import KNOWN_TO_PEFT, LoraConfig
from fastlora.errors import InputError
from fastlora.train_config import OF_THE_COMMAND, TrainConfig

# Tables that say what a run was made of.
RECORDS = ("data", "versions", "made_of")
# Settings that are given one way or another: one on the command line puts away all of the file's.
TOGETHER = (
    frozenset({"steps", "epochs"}), frozenset({"batch_size", "micro_batch_size", "gradient_accumulation_steps"}),
)


def read_config(path: str | os.PathLike) -> dict[str, dict]:
    """The tables of a configuration file.

    Raises:
        InputError: no such file, no TOML, or a table or key that is unknown: it is named, and the nearest known one.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config = {name!r}: cannot be read as TOML ({error})") from error
    train = [field.name for field in dataclasses.fields(TrainConfig)]
    lora = [field.name for field in dataclasses.fields(LoraConfig)]
    for key, value in tables.items():
        if not isinstance(value, dict):
            table = "train" if key in train else "lora" if key in lora else None
            raise InputError(f"config = {name!r}: {key} stands outside the tables; allowed are settings in [train] and [lora]"
                             + (f": put it into [{table}]" if table else ""))
        if key not in ("train", "lora", *RECORDS):
            raise InputError(f"config = {name!r}: unknown table {key}; allowed are [train] and [lora], and what a run adds: "
                             f"{', '.join(RECORDS)}")
    for table, known, silent in (("train", train, ()), ("lora", lora, KNOWN_TO_PEFT)):
        for key in tables.get(table, {}):
            if key not in known and key not in silent:
                near = difflib.get_close_matches(key, known, 1)
                raise InputError(f"config = {name!r}: unknown key {table}.{key}"
                                 + (f"; did you mean {near[0]}?" if near else f"; allowed are {', '.join(known)}"))
    return tables


def train_settings(stored: dict, given: dict) -> dict:
    """Fields of TrainConfig: the file's, with those of the command line in their place."""
    known = {field.name for field in dataclasses.fields(TrainConfig)} - set(OF_THE_COMMAND)
    kept = {name: value for name, value in stored.items() if name in known}
    for names in TOGETHER:
        if names & given.keys():
            kept = {name: value for name, value in kept.items() if name not in names}
    return kept | given


def lora_config(stored: dict | None, given: dict, model: str | None, source: str) -> LoraConfig:
    """LoraConfig from the file's table (None: there is none) and the command line, which wins.

    A rank on the command line without an alpha takes the file's alpha along, as any setting that is not given.

    Raises:
        InputError: a value that is not allowed, named.
    """
    if stored is None:
        return LoraConfig(base_model_name_or_path=model, **given)
    whole = {"peft_type": "LORA", "r": LoraConfig.r, "base_model_name_or_path": model} | stored
    whole.setdefault("lora_alpha", given.get("r", whole["r"]))
    return dataclasses.replace(LoraConfig.from_peft(whole, source), **given)
