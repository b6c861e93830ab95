"""Where the documents of a stream lie, as the kernels of attention read it (made by ops/attention_triton.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Edges(NamedTuple):
    """The documents of a stream of T tokens in blocks of 64.

    Attributes:
        table: int32 [4, T / 64]: first token and end of the document that each block lies in; the blocks by the keys that their queries
            look at, most first; and the pairs of neighbouring blocks by the queries that look at their keys (half a row). The orders are
            those in which a GPU gets work done soonest; no bit depends on them.
        short: whether a block of queries looks at less than two blocks of keys, on average.
    """

    table: torch.Tensor
    short: bool = False
