"""How many tokens go into one forward: the first guess, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.data import Row
from fastlora.errors import InputError, TrainingError
from fastlora.packing import padded_length
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


def halved(rows: Sequence[Row], cuts: list[list[int]], alignment: int, shortage: str) -> int:
    """The next smaller limit: half of the largest micro-batch that was tried, but room for the longest row.

    Raises:
        TrainingError: that largest micro-batch was a single sequence; nothing smaller is left.
    """
    def padded(cut: list[int]) -> int:
        return sum(padded_length(len(rows[i]), alignment) for i in cut)

    largest = max(cuts, key=padded)
    if max(map(len, cuts)) == 1:
        row = max(rows, key=len)
        raise TrainingError(f"out of memory with one sequence at a time (line {row.line}, {len(row)} "
                            f"tokens): {shortage}; lower --max-length or take a smaller model")
    longest = max(padded_length(len(row), alignment) for row in rows)
    return max(longest, padded(largest) // 2 // alignment * alignment)
