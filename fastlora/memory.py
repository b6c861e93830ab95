"""How many tokens go into one forward: the first guess, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.data import Row
from fastlora.errors import InputError, TrainingError
from fastlora.packing import padded_length, plan
from fastlora.train_config import TrainConfig

# "auto" starts here, padded tokens. On CPU a micro-batch much larger than the caches wins nothing, and every
# token of a small model holds megabytes of activations.
AUTO = {"cuda": 16384, "cpu": 1024}


def first_limit(config: TrainConfig, device: torch.device, rows: Sequence[Row], alignment: int) -> int:
    """Most padded tokens of a micro-batch: what the configuration says, or for "auto" a first guess that is
    halved when memory runs out.

    Raises:
        InputError: a single row, padded, is longer than what was given; its line is named.
    """
    row = max(rows, key=len)
    longest = padded_length(len(row), alignment)
    if config.micro_batch_tokens == "auto":
        return max(AUTO.get(device.type, AUTO["cpu"]), longest)
    if longest > config.micro_batch_tokens:
        raise InputError(
            f"micro_batch_tokens = {config.micro_batch_tokens}: line {row.line} takes {longest} tokens "
            f"({len(row)}, padded to a multiple of {alignment}); allowed is at least {longest}"
        )
    return config.micro_batch_tokens


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
