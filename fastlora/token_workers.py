"""Tasks encoded in several processes, results in order.

The processes are fresh interpreters with a pipe each, not forks (a fork of a process with threads or a GPU may hang) and not
``multiprocessing``'s spawn (which runs the caller's script again). Without them, the same function runs here.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe

from fastlora.errors import InputError
from fastlora.sources import Task
from fastlora.tokenizing import Encoding, Piece, encode_task

MOST = 32
# sys.path of the parent, then the loop. One thread a process: rayon's own would fight for the same cores.
_LAUNCH = ("import os, sys; os.putenv('TOKENIZERS_PARALLELISM', 'false'); sys.path[:] = {path!r}; "
           "from fastlora.token_workers import serve; serve({handle})")


def processes() -> int:
    """How many worker processes this machine can use: a core each; 0 where the pipe cannot be handed over."""
    if os.name != "posix":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if cores > 1 else 0


def encode_all(tasks: Iterable[Task], encoding: Encoding, workers: int) -> Iterator[tuple[Task, Piece]]:
    """(task, piece) of every task, in their order; at most two tasks a worker are under way, so memory is bounded.

    Args:
        workers: processes; 0 encodes in this one, as does a tokenizer that cannot be handed to another process.

    Raises:
        InputError: from a task (see :func:`encode_task`), or a worker that died.
    """
    state = _portable(encoding) if workers else None
    if state is None:
        for task in tasks:
            yield task, encode_task(task, encoding)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker(state)) for _ in range(workers)]
        free = collections.deque(pool)
        threads = stack.enter_context(ThreadPoolExecutor(workers))

        def run(task: Task) -> Piece:
            worker = free.popleft()  # as many threads as workers: one is free
            try:
                return worker.encode(task)
            finally:
                free.append(worker)

        waiting: collections.deque = collections.deque()
        try:
            for task in tasks:
                waiting.append((task, threads.submit(run, task)))
                if len(waiting) >= 2 * workers:
                    done, piece = waiting.popleft()
                    yield done, piece.result()
            while waiting:
                done, piece = waiting.popleft()
                yield done, piece.result()
        finally:
            for _, piece in waiting:
                piece.cancel()


def _portable(encoding: Encoding) -> bytes | None:
    """The encoding as bytes, or None if its tokenizer cannot travel (one made of a model folder's own code)."""
    if type(encoding.tokenizer).__module__.partition(".")[0] in ("transformers_modules", "__main__"):
        return None
    try:
        return pickle.dumps(encoding)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


class _Worker:
    """One process. ``encode`` may be called from any thread, one at a time."""

    def __init__(self, state: bytes) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            command = _LAUNCH.format(path=sys.path, handle=theirs.fileno())
            self._process = subprocess.Popen([sys.executable, "-c", command], pass_fds=[theirs.fileno()],
                                             stdin=subprocess.DEVNULL)
        self._pipe.send_bytes(state)

    def encode(self, task: Task) -> Piece:
        try:
            self._pipe.send(task)
            found = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise InputError(f"data {task.path}: a tokenizer process ended by itself (exit code {self._process.wait(5)}); "
                             "is memory short?") from error
        if isinstance(found, Exception):
            raise found
        return found

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(handle: int) -> None:
    """The worker's side: tasks in, pieces out, until the pipe closes. Ctrl-C is the parent's business."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(handle)
    encoding = pipe.recv()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(encode_task(task, encoding))
        except Exception as error:
            # Whatever went wrong belongs into the caller's process, under its own name.
            pipe.send(error)
