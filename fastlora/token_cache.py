"""Tokenized data on disk: made once, whole or not at all, mapped into memory, and found again by its digest.

The digest is that of the files' bytes, the tokenizer with its template and its version, and the options; a change of any
makes another folder. Nothing is ever changed in a folder that stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata

from fastlora.errors import InputError

# Goes up when rows are encoded or stored in another way than before.
LAYOUT = 1
STATE = "rows.json"


def digest(files: list[pathlib.Path], tokenizer, options: dict) -> str:
    """32 hex characters that name what tokenizing these files in this way gives.

    Raises:
        InputError: a file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    parts = {"layout": LAYOUT, "options": options, "names": [path.name for path in files], **_tokenizer(tokenizer)}
    whole.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        except OSError as error:
            raise InputError(f"data {path} cannot be read: {error.strerror}") from error
    return whole.hexdigest()


def _tokenizer(tokenizer) -> dict:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "class": type(tokenizer).__qualname__, "rules": hashlib.blake2b(rules.encode()).hexdigest(),
        "template": getattr(tokenizer, "chat_template", None), "special": tokenizer.special_tokens_map,
        "versions": [metadata.version(package) for package in ("tokenizers", "transformers")],
    }


def stored(folder: pathlib.Path) -> dict | None:
    """What a cached folder says of itself, or None if there is none."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def writing(place: str | os.PathLike, name: str) -> Iterator[tuple[pathlib.Path, dict]]:
    """(an empty folder to fill, the state to fill in); it becomes ``place / name`` when the block ends without an error.

    Raises:
        InputError: ``place`` cannot be written, or the disk is full; nothing of it stays.
    """
    final = pathlib.Path(place) / name
    made = not final.parent.exists()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=final.parent))
    except OSError as error:
        raise InputError(f"token_cache = {os.fspath(place)!r}: cannot be written ({error.strerror}); allowed is a folder "
                         "that can") from error
    state: dict = {}
    try:
        yield temporary, state
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if stored(final) is None:  # else another run made the same meanwhile
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    except OSError as error:
        raise InputError(f"token_cache = {os.fspath(place)!r}: the tokens could not be written ({error.strerror}); allowed is "
                         "a folder with room for about twice the data") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                final.parent.rmdir()
