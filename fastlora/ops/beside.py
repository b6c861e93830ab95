"""Sums over tokens that run beside a product, on a second stream.

A product's persistent grid leaves multiprocessors idle where its tiles fill the last turn evenly, and memory nearly so; the sums read much
and multiply little. They begin when the product does, are over before the next one begins, and what they read is held until then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

# Multiplications from which on a product lasts long enough to pay for the waits between two streams.
LARGE = 2**34


@functools.cache
def _second(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


class Later:
    """What a sum gives, once it has run."""

    __slots__ = ("call", "value")

    def __init__(self, call: Callable[[], object] | None, value: object = None) -> None:
        self.call, self.value = call, value


class Beside:
    """Sums that wait for a product to run beside, for ``with``: one block a backward, on one device. All have run when it ends.

    If it ends by an error, those that run are waited for: what they add to may be zeroed next, and what they read written again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: list[Later] = []
        self._running: list[Callable] = []

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, error, *rest) -> None:
        if error is None:
            self._run()
        self._join()

    def add(self, call: Callable, *arguments) -> Later:
        """``call(*arguments)`` is to run beside the next product, or at the block's end. The current stream must not write what it reads."""
        later = Later(functools.partial(call, *arguments))
        self._waiting.append(later)
        return later

    @contextlib.contextmanager
    def product(self, multiplications: int) -> Iterator[None]:
        """A block that starts a product of so many multiplications: what waits at its end runs beside it, or if it is small after it.

        A sum that is added inside must not read what the block makes: it waits for what came before the block alone. The current stream
        goes on without the sums, until the next product begins.
        """
        if self.device.type != "cuda" or multiplications < LARGE:
            yield
            self._run()
            return
        self._join()
        begun = torch.cuda.current_stream(self.device).record_event()
        yield
        if self._waiting:  # the product has started: before it, they would take its multiprocessors
            second = _second(self.device.index)
            with torch.cuda.stream(second):
                second.wait_event(begun)
                self._running = [later.call for later in self._waiting]
                self._run()

    def _run(self) -> None:
        while self._waiting:
            later = self._waiting.pop(0)
            later.value, later.call = later.call(), None

    def _join(self) -> None:
        if self._running:
            torch.cuda.current_stream(self.device).wait_stream(_second(self.device.index))
            # only now may what the sums read be freed: the current stream would write it again
            self._running = []
