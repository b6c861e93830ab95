"""Files are written whole or not at all: a temporary file beside the target, then a rename."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Iterator

from fastlora.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary path beside ``path``; rename it over ``path`` when the block ends without an error.

    The temporary file lies in the same folder, so the rename never crosses a file system. On an error
    (a full disk, an interrupt) it is removed and whatever stood at ``path`` stays as it was. The content is
    flushed to the disk before the rename.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is then unchanged.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private
        temporary.chmod(ordinary_mode())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike, argument: str) -> None:
    """Refuse, before any work, a file or folder that cannot be made or written to. Writes nothing.

    Raises:
        InputError: ``argument`` names what was given.
    """
    path = pathlib.Path(path)
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{argument} = {str(path)!r}: {existing} cannot be written")


@functools.cache
def ordinary_mode() -> int:
    """The permissions that a file made by an ordinary open() gets; looked up once, because looking changes them for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all (see :func:`atomic_write`)."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
