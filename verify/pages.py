"""Tensors in the middle of pages full of NaN: what is read or written out of bounds shows.

A tensor is copied into larger storage whose every other element is NaN (the smallest number for integers, -1 bytes for
8 bits), with the strides and the alignment it had. A read out of bounds brings NaN into the result; a write changes the
page. While :func:`allocations` is on, new buffers that Python code asks of torch lie in such pages too, and what torch
leaves uninitialised is NaN. The method is that of guard pages and red zones (Serebryany and others, "AddressSanitizer",
USENIX ATC 2012), with values in place of traps, because a GPU has no traps for a kernel's own allocations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# A kernel that forgets a mask reads or writes up to a tile beyond the edge: that many rows of the tensor, and at least
# some lines of memory. A multiple of 512 bytes keeps every alignment.
ROWS_BEYOND = 128
LEAST_BYTES = 4096
LINE = 512

_NAMES = ("empty", "empty_like", "zeros", "zeros_like")
_METHODS = ("new_empty", "new_zeros", "clone")


@dataclass(frozen=True)
class Page:
    """``view``: the tensor in its page. ``intact()``: whether nothing around it was written."""

    view: torch.Tensor
    flat: torch.Tensor
    first: int
    last: int
    before: torch.Tensor | None

    def intact(self) -> bool:
        """Whether the page outside the tensor's span (for inputs: all of it) has the bytes it had."""
        if self.before is not None:
            return torch.equal(_bytes(self.flat), self.before)
        spent = _bytes(torch.cat([self.flat[: self.first], self.flat[self.last :]]))
        return torch.equal(spent, _bytes(_poison(len(self.flat) - self.last + self.first, self.flat)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _poison(count: int, like: torch.Tensor) -> torch.Tensor:
    if like.is_floating_point():
        value: float = float("nan")
    elif like.dtype in (torch.bool, torch.uint8, torch.int8):
        value = {torch.bool: True, torch.uint8: 255, torch.int8: -1}[like.dtype]
    else:
        value = torch.iinfo(like.dtype).min
    return torch.full((count,), value, dtype=like.dtype, device=like.device)


@torch.no_grad()
def embed(tensor: torch.Tensor, *, is_input: bool, filled: bool = True) -> Page:
    """``tensor`` in a page of its own, with its strides and its alignment.

    Args:
        is_input: nothing at all in the page may change. filled: copy the values too; otherwise they stay NaN.
    """
    size, strides = tensor.size(), tensor.stride()
    item = tensor.element_size()
    span = 1 + sum((n - 1) * step for n, step in zip(size, strides)) if tensor.numel() else 0
    row = max((step for step in strides), default=1)
    beyond = -(-max(LEAST_BYTES, ROWS_BEYOND * row * item) // LINE) * LINE // item
    flat = _poison(2 * beyond + span + LINE // item, tensor)
    first = beyond + ((tensor.data_ptr() - flat[beyond:].data_ptr()) % LINE) // item
    view = flat.as_strided(size, strides, first)
    if filled and tensor.numel():
        # Only a layout without overlap can be copied element by element; an expanded one holds one row.
        own = tensor.as_strided((span,), (1,), tensor.storage_offset()) if 0 in strides else None
        flat[first : first + span].copy_(own) if own is not None else view.copy_(tensor)
    return Page(view, flat, first, first + span, _bytes(flat).clone() if is_input else None)


@contextlib.contextmanager
def allocations() -> Iterator[list[Page]]:
    """New buffers lie in pages until the block ends; yields the list of them."""
    pages: list[Page] = []

    def paged(real, filled: bool):
        @functools.wraps(real)
        def make(*args, **keywords):
            made = real(*args, **keywords)
            plain = type(made) is torch.Tensor and made.layout == torch.strided and not made.is_meta
            if not plain or made.requires_grad or not made.numel():
                return made
            page = embed(made, is_input=False, filled=filled)
            pages.append(page)
            return page.view

        return make

    saved = [(torch, name, getattr(torch, name)) for name in _NAMES]
    saved += [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in _METHODS]
    try:
        for owner, name, real in saved:
            setattr(owner, name, paged(real, "empty" not in name))
        yield pages
    finally:
        for owner, name, real in saved:
            if owner is torch.Tensor:
                delattr(owner, name)
                if getattr(owner, name) is not real:
                    setattr(owner, name, real)
            else:
                setattr(owner, name, real)
