"""Whether the GPU still answers: an illegal access of a kernel ends every later call of the process."""

from __future__ import annotations

import torch


def broken() -> str | None:
    """CUDA's first line about a context that is lost, or None where it is not, or none is in use."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None
