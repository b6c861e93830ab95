"""Work spread over threads so that no bit depends on how many there are.

torch splits one operation over its intra-op threads, and where it cuts depends on their number: a
product of equal shape then has other bits, and so has an element-wise function whose vector tail
falls elsewhere. Here the cutting is the caller's (``stream.tiles``) and every piece runs whole on
one thread; the threads only share out the pieces.

``torch.set_num_threads(1)`` sets three things: OpenMP's number of the *calling thread*, MKL's
number of the *calling thread*, and one number for the process that a thread takes over the first
time it computes. So each worker calls it once for itself, and the caller's own number is put back
afterwards. Autograd runs the backward of CPU tensors on the thread that called it, which is why
:func:`single_thread` around a whole step covers the backward too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_local = threading.local()
_lock = threading.Lock()
_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_started = 0


def _after_fork() -> None:
    """A forked child has none of the parent's threads: begin with an empty pool."""
    global _jobs, _lock, _started
    _jobs, _lock, _started = queue.SimpleQueue(), threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Job:
    """One call of :func:`run`: the items, a counter that hands them out, and the first error."""

    def __init__(self, fn: Callable[[Any], object], items: list, helpers: int) -> None:
        self.fn = fn
        self.items = items
        # next() on itertools.count is one call into C, so two threads never get the same number
        self.next = itertools.count().__next__
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.error: BaseException | None = None
        self.pending = helpers
        self.done = threading.Event()
        self.lock = threading.Lock()

    def work(self) -> None:
        """Take items until there are none left or one has failed."""
        try:
            while self.error is None:
                index = self.next()
                if index >= len(self.items):
                    return
                self.fn(self.items[index])
        except BaseException as error:  # kept for the caller, who raises it
            self.error = error

    def help(self) -> None:
        """:meth:`work` on a worker thread, under the caller's gradient mode."""
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            self.work()
        with self.lock:
            self.pending -= 1
            if self.pending == 0:
                self.done.set()


def _worker(ready: threading.Event) -> None:
    torch.set_num_threads(1)
    _local.inside = True
    ready.set()
    while True:
        _jobs.get().help()


def _ensure(workers: int) -> None:
    """Start worker threads until there are ``workers``. The process's own number of threads is put
    back by the caller.
    """
    global _started
    with _lock:
        while _started < workers:
            ready = threading.Event()
            name = f"fastlora-block-{_started}"
            threading.Thread(target=_worker, args=(ready,), name=name, daemon=True).start()
            ready.wait()
            _started += 1


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Turn intra-op parallelism off on this thread; :func:`run` still uses as many threads as there
    were before.

    Around a whole CPU step every row-wise operation of the model, forward and backward, then runs
    on one thread. Nested use changes nothing. The former number of threads is restored at the end,
    also after an error.
    """
    if getattr(_local, "workers", None) is not None or getattr(_local, "inside", False):
        yield
        return
    before = torch.get_num_threads()
    _local.workers = before
    try:
        _ensure(before - 1)
        torch.set_num_threads(1)
        yield
    finally:
        _local.workers = None
        torch.set_num_threads(before)


def _wait(job: _Job) -> None:
    """Wait for the helpers, also through an interrupt: nothing may still write when run() returns."""
    while True:
        try:
            job.done.wait()
            return
        except BaseException as error:  # KeyboardInterrupt: stop handing out items, then raise it
            job.error = error


def run(fn: Callable[[Any], object], items: Iterable) -> None:
    """Call ``fn(item)`` for every item, each call on exactly one thread with intra-op parallelism
    off.

    The threads are the caller and helpers, as many together as ``torch.get_num_threads()`` said
    (before :func:`single_thread`, inside it). Results are what ``fn`` writes; two items must not
    write to the same place, or only under a lock and in an arithmetic without order (integers). A
    call from inside ``fn`` runs inline.

    Raises:
        whatever ``fn`` raised first; items not yet begun are then left out.
    """
    items = list(items)
    if getattr(_local, "inside", False):
        for item in items:
            fn(item)
        return
    with single_thread():
        _local.inside = True
        try:
            helpers = min(_local.workers, len(items)) - 1
            job = _Job(fn, items, helpers)
            for _ in range(helpers):
                _jobs.put(job)
            job.work()
            if helpers > 0:
                _wait(job)
        finally:
            _local.inside = False
    if job.error is not None:
        raise job.error
