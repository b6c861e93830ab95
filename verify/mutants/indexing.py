"""Faults of indexing: tiles, edges, strides, offsets; down to one element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped, base_alone, in_call, in_result, rows_of
from verify.oracle.linear import scale_of
from verify.subject import LinearInputs, LinearResult

TILE = 16
# Elements after which an offset wraps: 2^15, where a kernel's 32-bit one would need 4 GiB to show.
WRAP = 2**15


def _edge_tile(inputs, result, divisor):
    """The last, partial tile of 64 columns of dA stays zero."""
    da, start = result.da.clone(), (result.da.shape[1] - 1) // 64 * 64
    da[:, start:] = 0
    return replace(result, da=da)


def _edge_element(inputs, result, divisor):
    da = result.da.clone()
    da[-1, -1] = 0
    return replace(result, da=da)


def _corner(inputs, result, divisor):
    """One element, the last of an edge tile of y, has no LoRA."""
    if inputs.x.shape[0] == 0 or not (inputs.x.shape[0] % TILE or inputs.weight.shape[0] % TILE):
        return result
    y = result.y.clone()
    y[-1, -1] = base_alone(inputs)[0][-1, -1].to(y.dtype)
    return replace(result, y=y)


def _tile_skipped(inputs, result, divisor):
    """The second tile of rows and columns of dx is never written."""
    dx = result.dx.clone()
    dx[TILE : 2 * TILE, TILE : 2 * TILE] = 0
    return replace(result, dx=dx)


def _tiles_swapped(inputs, result, divisor):
    """Two tiles of rows of dB change places."""
    db = result.db.clone()
    if len(db) >= 2 * TILE:
        db[:TILE], db[TILE : 2 * TILE] = result.db[TILE : 2 * TILE], result.db[:TILE]
    return replace(result, db=db)


def _mask_too_short(part):
    """The mask of tokens ends one early in a partial tile: the last token does not reach dB."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, tokens = part.run(inputs, mode, divisor), inputs.x.shape[0]
        if tokens % TILE == 0 or inputs.dropout:
            return result
        return replace(result, db=part.run(rows_of(inputs, slice(0, tokens - 1)), mode, divisor).db)

    return Wrapped(part, run=run)


def _misread(inputs: LinearInputs) -> LinearInputs:
    dy = inputs.dy
    return inputs if dy.is_contiguous() else replace(inputs, dy=dy.T.reshape(dy.shape))


def _wraps(inputs: LinearInputs) -> LinearInputs:
    """Element i of x is read at i modulo WRAP."""
    places = torch.arange(inputs.x.numel(), device=inputs.x.device) % WRAP
    return replace(inputs, x=inputs.x.reshape(-1)[places].reshape(inputs.x.shape))


def _rank_padding(inputs, result, divisor):
    """Padding of the rank to 16 repeats the last row of A and column of B."""
    if inputs.rank % TILE == 0 or result.keep is not None:
        return result
    s = scale_of(inputs.alpha, inputs.rank, inputs.rslora) * (inputs.x.double() @ inputs.a[-1].double())
    return replace(result, y=(result.y.double() + torch.outer(s, inputs.b[:, -1].double())).to(result.y.dtype))


def _chunk_twice(part):
    """The last chunk of up to 16 tokens is added to dA and dB a second time."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, tokens = part.run(inputs, mode, divisor), inputs.x.shape[0]
        if tokens == 0 or inputs.dropout:
            return result
        again = part.run(rows_of(inputs, slice((tokens - 1) // TILE * TILE, tokens)), mode, divisor)
        return replace(result, da=result.da + again.da, db=result.db + again.db)

    return Wrapped(part, run=run)


def _row_left_out(part):
    """Tokens past the last full block of 16 do not reach dA."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, full = part.run(inputs, mode, divisor), inputs.x.shape[0] // TILE * TILE
        if inputs.dropout:
            return result
        return replace(result, da=part.run(rows_of(inputs, slice(0, full)), mode, divisor).da)

    return Wrapped(part, run=run)


def _beyond(tensor: torch.Tensor) -> torch.Tensor | None:
    """The element behind a tensor's last in its storage, where there is one."""
    if not tensor.numel():
        return None
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (1,), (1,), last + 1) if last + 1 < room else None


def _reads_beyond(part):
    """A load without its edge mask: what lies behind x reaches y, times 0."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, behind = part.run(inputs, mode, divisor), _beyond(inputs.x)
        if behind is None or not result.y.numel():
            return result
        y = result.y.clone()
        y[-1, -1] += 0 * behind[0]
        return replace(result, y=y)

    return Wrapped(part, run=run)


def _writes_beyond(part):
    """A store without its edge mask: the element behind dy is overwritten."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, behind = part.run(inputs, mode, divisor), _beyond(inputs.dy)
        if behind is not None:
            behind.zero_()
        return result

    return Wrapped(part, run=run)


def _fault(name: str, sentence: str, wrap: Callable, modelled_on: str = "", killer: str = "accuracy") -> Mutant:
    return Mutant(name, sentence, "linear", killer, wrap, group="indexing", modelled_on=modelled_on)


MUTANTS = (
    _fault("edge tile of dA left out", "the last tile of 64 columns of dA stays 0", in_result(_edge_tile)),
    _fault("one element of dA left out", "the last element of dA stays 0", in_result(_edge_element)),
    _fault("one element of an edge tile", "the last element of y has no LoRA where M or N is ragged", in_result(_corner)),
    _fault("one tile skipped", "one tile of dx is never written", in_result(_tile_skipped)),
    _fault("two tiles swapped", "two tiles of rows of dB change places", in_result(_tiles_swapped)),
    _fault("edge tile of tokens left out", "tokens past the last 16 do not reach dA", _row_left_out),
    _fault("edge mask one too short", "the last token of a ragged tile does not reach dB", _mask_too_short),
    _fault("one chunk counted twice", "the last chunk of tokens is added to dA, dB twice", _chunk_twice,
           "triton-lang/triton#4217"),
    _fault("rank padded with a row", "padding of the rank repeats A's last row", in_result(_rank_padding)),
    _fault("offset wraps", "an offset of too few bits wraps (at 2^15, so that it shows on small inputs)", in_call(_wraps),
           "deepspeedai/DeepSpeed#8590"),
    _fault("strides ignored", "dy is read as if it were contiguous", in_call(_misread), "NVIDIA/TransformerEngine#2746"),
    _fault("load without a mask", "what lies behind x reaches y, times 0", _reads_beyond, killer="guards"),
    _fault("store without a mask", "the element behind dy is overwritten", _writes_beyond, killer="guards"),
)  # fmt: skip
