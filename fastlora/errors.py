"""The two kinds of error a user meets: bad input (before any work) and a run that had to stop."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, found before any work started.

    The message names the argument, the value and what is allowed. The command line prints it as the
    last line on stderr and exits with 2.
    """


class TrainingError(RuntimeError):
    """A run that could not go on (a non-finite gradient, a saturated sum, a full disk).

    The message names the step, the sequence or the module. The command line exits with 1; the last good
    adapter and checkpoint stay on disk.
    """
