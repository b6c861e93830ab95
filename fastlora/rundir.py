"""The output folder of a run: which files it holds, when it may be written, and ``run.toml``."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import shlex
import shutil
import sys
import tomllib
from importlib import metadata
from typing import TYPE_CHECKING

from fastlora import __version__, lock, token_rows
from fastlora.digest import digest
from fastlora.errors import InputError
from fastlora.files import atomic_write_text, check_writable
from fastlora.inject import injection
from fastlora.train_config import DECIDES_BYTES, TrainConfig

if TYPE_CHECKING:
    from fastlora.train import Trainer

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
REPORT, LOG, PICTURE, RUN = "report.json", "log.jsonl", "loss.png", "run.toml"
# best: the adapter with the lowest held-out loss so far.
CHECKPOINTS, BOARD, BEST = "checkpoints", "tensorboard", "best"
OWN = (*ADAPTER_FILES, REPORT, LOG, PICTURE, RUN, CHECKPOINTS, BOARD, BEST)
TOKENS = "fastlora-tokens"


def holds_run(folder: pathlib.Path) -> bool:
    """Whether any file of a run lies in ``folder``."""
    return any((folder / name).exists() for name in OWN)


def check(config: TrainConfig) -> None:
    """Refuse an output folder that may not be written. Writes nothing.

    Raises:
        InputError: a file; not writable; holds another run (and neither ``resume`` nor ``overwrite`` is
            given); ``resume`` where there is no run.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output = {config.output!r}: it is a file; allowed is a folder")
    check_writable(config.output, "output")
    if folder.is_dir():
        lock.check(folder)
    if config.resume:
        stored_run(folder)
    if holds_run(folder) and not (config.resume or config.overwrite):
        raise InputError(f"output = {config.output!r}: the folder holds another run; allowed are --resume to "
                         "go on with it, --overwrite to replace it, or another folder")


def open_folder(config: TrainConfig) -> pathlib.Path:
    """Make the folder; under ``overwrite`` take away the files of the run that is there, and no others.

    What a killed process had half written, always under a temporary name, goes too.
    """
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):
        if left.name.startswith(tuple(f".{name}." for name in OWN)):
            left.unlink()
    for left in (folder / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(left)
    if config.overwrite:
        for name in OWN:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Versions of what decides the bits, and of Python."""
    # Its own from the package itself: a checkout that is not installed has a version too.
    found = {"python": platform.python_version(), "fastlora": __version__}
    for package in ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def changed_versions(was: dict[str, str]) -> str | None:
    """What differs from the versions ``was`` of an earlier session, in words; None if nothing does."""
    now = versions()
    changed = [f"{n} {was.get(n)} -> {now[n]}" for n in now if was.get(n) != now[n]]
    return changed and "the same bytes are promised for the same versions only; changed: " + ", ".join(changed) or None


def identity(trainer: Trainer) -> dict:
    """What a prepared run is made of, by name: all that decides its bytes."""
    lora = injection(trainer.model).config.to_peft()
    lora.pop("base_model_name_or_path", None)
    data = hashlib.md5(usedforsecurity=False)
    for block in token_rows.keys(trainer.rows):
        data.update(block)
    parts = {name: getattr(trainer.config, name) for name in DECIDES_BYTES}
    parts |= {"steps": trainer.total, "lora": lora, "device": trainer.device.type,
              "dtype": str(next(trainer.model.parameters()).dtype), "model": trainer.start.frozen,
              "data": data.hexdigest(),
              "adapter at the start": digest(trainer.start.tensors)}
    return json.loads(json.dumps(parts))


def made_of(whole: dict) -> dict:
    """The part of a run's :func:`identity` that ``run.toml`` holds in no other table."""
    return {name: whole[name] for name in ("device", "dtype", "steps", "model", "data", "adapter at the start")}


def repeated(stored: dict[str, dict], whole: dict) -> list[str]:
    """What a run stands on that is not what the ``run.toml`` it repeats stood on, a line each.

    Args:
        stored: tables of the file. whole: :func:`identity` of the prepared run.
    """
    was, now = stored.get("made_of", {}), made_of(whole)
    lines = [f"config: {name} is not what the file was written for ({was[name]} then, {now[name]} now); the adapter will differ"
             for name in now if name in was and was[name] != now[name]]
    changed = changed_versions(stored["versions"]) if "versions" in stored else None
    return lines + ([f"config: {changed}"] if changed else [])


def write_run(folder: pathlib.Path, tables: dict[str, dict]) -> None:
    """Write ``run.toml``: one table each of the complete resolved configuration. None is left out."""
    atomic_write_text(folder / RUN, "# Written by fastlora train; what is not listed had no value.\n" + toml_of(tables))


def toml_of(tables: dict[str, dict]) -> str:
    """TOML of tables of plain values, as :func:`read_run` reads them. None is left out."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]\n")
        lines += [f"{_key(k)} = {_toml(v)}\n" for k, v in table.items() if v is not None]
        lines.append("\n")
    return "".join(lines)


def read_run(folder: str | os.PathLike) -> dict[str, dict]:
    """The tables of ``run.toml`` in ``folder``.

    Raises:
        InputError: there is none, or it is not TOML.
    """
    path = pathlib.Path(folder) / RUN
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"output = {os.fspath(folder)!r}: its {RUN} cannot be read ({error})") from error


def stored_run(folder: str | os.PathLike) -> dict[str, dict]:
    """:func:`read_run` for ``--resume``.

    Raises:
        InputError: no run in ``folder``, or a ``run.toml`` that cannot be read.
    """
    if not (pathlib.Path(folder) / RUN).is_file():
        raise InputError(f"resume: no run to go on with in output = {os.fspath(folder)!r} (no {RUN} there)")
    return read_run(folder)


def how_to_go_on(config: TrainConfig) -> str:
    """The command that goes on with a stopped run; ``run.toml`` holds all the rest."""
    return f"{own_command()} train --output {shlex.quote(config.output)} --resume"


def own_command() -> str:
    """How this very installation is called from a shell: ``fastlora`` where that is it, else by the path of its Python."""
    beside = pathlib.Path(sys.executable).parent / "fastlora"
    found = shutil.which("fastlora")
    if found is not None and beside.exists() and os.path.samefile(found, beside):
        return "fastlora"
    return f"{shlex.quote(sys.executable)} -m fastlora"


def _key(name: str) -> str:
    bare = name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if bare else json.dumps(name)


def _toml(value) -> str:
    """A TOML value. JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    raise TypeError(f"no TOML value: {value!r}")
