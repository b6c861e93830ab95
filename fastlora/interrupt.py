"""Ctrl-C and SIGTERM as a wish to stop: the step that runs is finished first."""

from __future__ import annotations

import signal
import threading


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is only noted in ``signal``; a second interrupts at once.

    Outside the main thread Python cannot take signals over; nothing is noted there.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
