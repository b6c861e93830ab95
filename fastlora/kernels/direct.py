"""Triton 3.6's launcher without its Python part: descriptors are encoded once for each address, and the C function is called directly.

What a launch costs there is mostly the encoding of tensor descriptors and two Python functions around the C one. These are details of
one release: any other one is launched as Triton does it, with the same result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import triton

RELEASE = "3.6."
# Encoded descriptors that a binary keeps; a run of varied lengths starts anew then.
MOST_KEPT = 1024


class Direct:
    """Starts one binary.

    Args:
        start: the C function. head: what it takes between the function and the kernel's arguments.
        metas: of each descriptor, as the compiler laid it out. encode: (descriptor, meta) -> the arguments it becomes.
    """

    def __init__(self, start: Callable, function, head: tuple, metas: list, encode: Callable) -> None:
        self.start, self.function, self.head, self.metas, self.encode = start, function, head, metas, encode
        self._kept: dict[tuple, list] = {}
        self._places: tuple[list, list] | None = None

    def __call__(self, grid: tuple[int, int, int], stream, arguments: tuple, describe: tuple, constants: tuple, refuse: Callable) -> None:
        """Launch. ``describe``: makers of descriptors for the first arguments, None for a pointer; ``refuse`` is called with a tensor that
        is not on a GPU. The kinds of the arguments are those of the first call."""
        if self._places is None:
            self._places = self._look(arguments, describe)
        pointers, descriptors = self._places
        given = list(arguments)
        for place in pointers:
            tensor = given[place]
            given[place] = tensor.data_ptr() if tensor.is_cuda else refuse(tensor)
        for place, meta in descriptors:  # from the last on: each becomes several arguments
            one = given[place]
            make = describe[place] if place < len(describe) else None
            if make is None:
                given[place : place + 1] = self.encode(one, meta)
                continue
            key = (make, one.data_ptr(), one.shape, one.stride())
            found = self._kept.get(key)
            if found is None:
                found = self._encoded(key, one if one.is_cuda else refuse(one), meta, make)
            given[place : place + 1] = found
        self.start(*grid, stream, self.function, *self.head, *given, *constants)

    def _look(self, arguments: tuple, describe: tuple) -> tuple[list, list]:
        """(places of pointers, (place, meta) of descriptors from the last on)."""
        made = {i for i, make in enumerate(describe) if make is not None}
        described = [i for i, one in enumerate(arguments) if i in made or hasattr(one, "block_shape")]
        pointers = [i for i, one in enumerate(arguments) if i not in described and isinstance(one, torch.Tensor)]
        return pointers, [*zip(described, self.metas, strict=True)][::-1]

    def _encoded(self, key: tuple, tensor: torch.Tensor, meta, make: Callable) -> list:
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        found = self._kept[key] = self.encode(make(tensor), meta)
        return found


def direct(compiled) -> Direct | None:
    """How to start ``compiled`` directly, or None: another release, or a binary that needs memory of its own."""
    if not triton.__version__.startswith(RELEASE):
        return None
    from triton.backends.nvidia import driver

    run = compiled.run
    if not isinstance(run, driver.CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
        return None
    start, metas = run.launch, []
    if inspect.isfunction(start):  # it expands descriptors before it calls the C function
        inside = inspect.getclosurevars(start).nonlocals
        if not {"launcher", "tensordesc_meta"} <= inside.keys():
            return None
        start, metas = inside["launcher"], inside["tensordesc_meta"]
    head = (run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None)
    return Direct(start, compiled.function, head, metas, driver.make_tensordesc_arg)
