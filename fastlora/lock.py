"""One run a folder: a lock that the system itself releases when a process dies, kill -9 included."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator

from fastlora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


def check(folder: pathlib.Path) -> None:
    """Refuse a folder in which another run is at work. Writes nothing.

    Raises:
        InputError: names the other run's process, machine and start.
    """
    if fcntl is None:
        return
    with contextlib.suppress(FileNotFoundError), open(folder / NAME, "rb") as file:
        _take(file, folder)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[str | None]:
    """Hold ``folder`` while the block runs; makes the folder. Gives a sentence if a dead run's lock was taken over, or that
    this system has no locks.

    Raises:
        InputError: another run holds it. OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield "lock: this system has none; do not start two runs in one folder"
        return
    path = folder / NAME
    while True:
        file = path.open("ab+")
        try:
            _take(file, folder)
            same = os.path.exists(path) and os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
        except BaseException:
            file.close()
            raise
        if same:
            break
        file.close()  # its holder has just ended and removed it
    try:
        left = _owner(file)
        file.truncate(0)
        me = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(me).encode())
        file.flush()
        yield f"lock: {left} ended without removing it; taken over" if left else None
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _take(file, folder: pathlib.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"output = {str(folder)!r}: another run is at work there ({_owner(file) or 'just begun'}); wait for "
                         "it, or take another folder") from error


def _owner(file) -> str:
    """Who wrote the lock, in words; "" if nobody did."""
    file.seek(0)
    try:
        found = json.loads(file.read() or b"{}")
        return f"process {found['process']} on {found['machine']}, since {found['since']}" if found else ""
    except (ValueError, KeyError, TypeError):
        return "a process that wrote half of its name"
