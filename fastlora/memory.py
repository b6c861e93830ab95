"""How many tokens go into one forward: the first guess, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastlora.errors import InputError, TrainingError
from fastlora.packing import padded_length, plan
from fastlora.token_rows import Row, longest
from fastlora.train_config import TrainConfig

# "auto" starts here, padded tokens. On CPU a micro-batch much larger than the caches wins nothing, and every
# token of a small model holds megabytes of activations.
AUTO = {"cuda": 16384, "cpu": 1024}
# Of the room that is left, how much growing may count on: the rest is for fragments and for other shapes of batches.
SHARE = 0.85

T = TypeVar("T")


class Budget:
    """Most padded tokens of a micro-batch, ``limit``: as configured, or for "auto" found while training.

    "auto" begins with a guess, halves it when memory runs out, and on a GPU raises it (at most to double, and never to a size
    that failed) as long as batches are cut and the memory that a token takes, measured, says that more fit.

    Args:
        config: the run's settings. device: where it trains. row_sets: training rows, held-out rows.
        alignment: padding of a row. say: gets a line when ``limit`` changes.

    Raises:
        InputError: a single row, padded, is longer than what was given; its line is named.
    """

    def __init__(self, config: TrainConfig, device: torch.device, row_sets: Sequence[Sequence[Row]], alignment: int,
                 say: Callable[[str], object]) -> None:
        self.device, self.alignment, self.say = device, alignment, say
        row = max((rows[longest(rows)] for rows in row_sets if len(rows)), key=len)
        need = padded_length(len(row), alignment)
        self.auto = config.micro_batch_tokens == "auto"
        self.limit = max(AUTO.get(device.type, AUTO["cpu"]), need) if self.auto else config.micro_batch_tokens
        self.failed: int | None = None
        if need > self.limit:
            raise InputError(
                f"micro_batch_tokens = {config.micro_batch_tokens}: line {row.line} takes {need} tokens "
                f"({len(row)}, padded to a multiple of {alignment}); allowed is at least {need}"
            )

    def run(self, rows: Sequence[Row], work: Callable[[list[list[int]]], T], clear: Callable[[], object], where: str) -> T:
        """``work(cuts)``, with the micro-batches halved and everything repeated as often as memory runs out.

        Args:
            clear: drops the sums of the unfinished work, so that the bytes are those of a run that never ran out.
            where: what is repeated, in words.

        Raises:
            TrainingError: memory ran out with one sequence at a time.
        """
        while True:
            cuts = cuts_within(rows, self.limit, self.alignment)
            try:
                return work(cuts)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = str(error).splitlines()[0]
            # Outside the except block: the error held every activation of the failed work.
            clear()
            self.failed = min(self.limit, self.failed or self.limit)
            self.limit = halved(rows, cuts, self.alignment, shortage)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(f"out of memory {where}: repeating it with micro-batches of at most {self.limit} padded tokens; the "
                     "result is the same")

    def grow(self, rows: Sequence[Row]) -> None:
        """After a step that went well: raise ``limit`` if it cut ``rows`` and memory is left. For "auto" alone."""
        padded = [padded_length(len(row), self.alignment) for row in rows]
        if not self.auto or sum(padded) <= self.limit:
            return
        found = memory_of(self.device)
        if found is None:
            return
        peak, now, room = found
        used = max(sum(padded[i] for i in cut) for cut in cuts_within(rows, self.limit, self.alignment))
        fits = int(SHARE * room / max((peak - now) / used, 1.0))
        wanted = min(fits, 2 * self.limit, sum(padded), *([self.failed - self.alignment] if self.failed else []))
        wanted = wanted // self.alignment * self.alignment
        # A few tokens more would save no forward.
        if wanted >= self.limit + max(padded):
            self.limit = wanted
            self.say(f"micro-batches: at most {self.limit} padded tokens from now on, as memory allows; the result is the same")


def memory_of(device: torch.device) -> tuple[int, int, int] | None:
    """Bytes of a CUDA device: (peak of what was allocated, allocated now, room for what is not allocated now), or None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    now = torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device), now, free + torch.cuda.memory_reserved(device) - now


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def cuts_within(rows: Sequence[Row], limit: int, alignment: int) -> list[list[int]]:
    """Micro-batches of at most ``limit`` padded tokens; a row longer than that (only after memory ran out) goes alone."""
    long = [i for i, row in enumerate(rows) if padded_length(len(row), alignment) > limit]
    short = [i for i in range(len(rows)) if i not in long]
    packed = plan([rows[i] for i in short], limit, alignment)
    return [[i] for i in long] + [[short[i] for i in cut] for cut in packed]


def halved(rows: Sequence[Row], cuts: list[list[int]], alignment: int, shortage: str) -> int:
    """The next smaller limit: half of the largest micro-batch that held more than one sequence.

    Raises:
        TrainingError: every micro-batch was a single sequence; nothing smaller is left.
    """
    shared = [sum(padded_length(len(rows[i]), alignment) for i in cut) for cut in cuts if len(cut) > 1]
    if not shared:
        row = max(rows, key=len)
        raise TrainingError(f"out of memory with one sequence at a time (line {row.line}, {len(row)} "
                            f"tokens): {shortage}; lower --max-length or take a smaller model")
    return max(alignment, max(shared) // 2 // alignment * alignment)
