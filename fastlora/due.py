"""What is due after a step: an evaluation, a checkpoint, a picture."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastlora.train_config import TrainConfig

# Seconds between pictures at least; and of a run's time at most one part in so many goes into drawing.
PICTURE_SECONDS, PICTURE_PART = 30.0, 500


class Due:
    """Keeps the clock of a run.

    Args:
        config: the run's settings. total: its optimiser steps. clock: seconds, monotonic.
    """

    def __init__(self, config: TrainConfig, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.total, self.clock = config, total, clock
        self._saved = clock()
        self._drawn, self._wait = clock(), PICTURE_SECONDS

    def evaluation(self, step: int) -> bool:
        """Whether held-out data is evaluated after ``step``: as configured, else four times in a run; always at its end."""
        return step % (self.config.eval_every or max(1, self.total // 4)) == 0 or step == self.total

    def checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step``; that of the last step is written by the end of the run."""
        if step == self.total:
            return False
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        return bool(every and step % every == 0) or bool(minutes and self.clock() - self._saved >= 60 * minutes)

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = self.clock()

    def picture(self, draw: Callable[[], object]) -> None:
        """``draw()`` if the last picture is old enough."""
        start = self.clock()
        if start - self._drawn >= self._wait:
            draw()
            self._drawn = self.clock()
            self._wait = max(PICTURE_SECONDS, PICTURE_PART * (self._drawn - start))
