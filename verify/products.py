"""Which of torch's own products (cuBLAS on a GPU, MKL or oneDNN on a CPU) a call makes.

Nobody promises that their bits do not depend on the number of rows: where an operation calls one, that they do not has
to be seen, and the report says where.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Names of aten's operators that end in a matrix product, an attention or a convolution of a library.
_WORDS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "addr",
    "dot",
    "matmul",
    "linear",
    "convolution",
    "scaled_dot_product",
)


class Products(TorchDispatchMode):
    """``names`` of the products called while the block lasts, in the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and (name.strip("_") in _WORDS or "scaled_dot_product" in name):
            self.names.add(f"aten.{name}")
        return func(*args, **(kwargs or {}))


def products_of(run, packed) -> set[str]:
    """The products that ``run(packed)`` calls from its own thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Products() as seen:
            run(packed)
    finally:
        torch.set_num_threads(threads)
    return seen.names
