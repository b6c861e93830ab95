"""Faults of single operations: what lets the rest of a stream into a document's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.subject import Operation, Packed, Subject

Run = Callable[[Packed], dict[str, list[torch.Tensor]]]

# Rows from which faults that go by the size of a stream show: more than one document alone has with its padding.
MANY = 200


def _mean_leaks(run: Run, packed: Packed):
    """A 1024th of the mean over the whole stream is added to every row."""
    return run(replace(packed, x=(packed.x + packed.x.float().mean(0) / 1024).to(packed.x.dtype)))


def _place_in_stream(run: Run, packed: Packed):
    """The stream counts as one document: places are counted from its start."""
    total = len(packed.x)
    found = run(replace(packed, lengths=(total,), ids=packed.ids[:1]))
    return {name: packed.cut(values[0]) for name, values in found.items()}


def _over_the_edge(run: Run, packed: Packed):
    """Each document but the first sees the last row of the one before it."""
    found: dict[str, list[torch.Tensor]] = {}
    spans = packed.spans
    for i, (start, stop) in enumerate(spans):
        rows = torch.arange(start, stop)
        extra = torch.tensor([spans[i - 1][1] - 1] if i else [], dtype=torch.int64)
        rows = torch.cat([extra, rows])
        padded = torch.zeros(-(-len(rows) // packed.alignment) * packed.alignment, dtype=torch.int64)
        padded[: len(rows)] = rows
        x, dy = packed.x[padded], packed.dy[padded].clone()
        dy[len(rows) :] = 0
        own = run(replace(packed, lengths=(len(rows),), ids=packed.ids[i : i + 1], x=x, dy=dy))
        for name, values in own.items():
            found.setdefault(name, []).append(values[0][len(extra) :])
    return found


def _halves(run: Run, packed: Packed, field: str):
    """What two runs give, each with one half of the columns of x or dy, in the order of the halves."""
    whole = getattr(packed, field)
    middle = whole.shape[1] // 2
    low, high = whole.clone(), whole.clone()
    low[:, middle:], high[:, :middle] = 0, 0
    return run(replace(packed, **{field: low})), run(replace(packed, **{field: high}))


def _split_k(run: Run, packed: Packed):
    """In long streams y is summed over two halves of K."""
    found = run(packed)
    if len(packed.x) >= MANY:
        low, high = _halves(run, packed, "x")
        found = {**found, "y": [a + b for a, b in zip(low["y"], high["y"])]}
    return found


def _tile_by_rows(run: Run, packed: Packed):
    """In long streams the backward reduces over two halves of a row."""
    found = run(packed)
    if len(packed.x) >= MANY:
        low, high = _halves(run, packed, "dy")
        found = {**found, "dx": [a + b for a, b in zip(low["dx"], high["dx"])]}
    return found


def _second_tile(run: Run, packed: Packed):
    """Rows behind the first 128 of the stream go through 8 bits of mantissa."""
    found, ys = run(packed), []
    for (start, stop), y in zip(packed.spans, found["y"]):
        late = (torch.arange(start, stop, device=y.device) >= 128)[:, None]
        ys.append(torch.where(late, y.bfloat16().to(y.dtype), y))
    return {**found, "y": ys}


def _padding_leaks(run: Run, packed: Packed):
    """The row behind a document's last is added to it, scaled down."""
    x, ends = packed.x.clone(), [stop for _, stop in packed.spans if stop % packed.alignment]
    for stop in ends:
        x[stop - 1] += (packed.x[stop].float() / 64).to(x.dtype)
    return run(replace(packed, x=x))


def _ids_by_place(run: Run, packed: Packed):
    """Documents are named by their place in the stream."""
    return run(replace(packed, ids=tuple(range(len(packed.ids)))))


def _kept(run: Run, packed: Packed, memory: dict = {}):  # noqa: B006 - the fault is that it remembers
    """A result is kept and given again for every stream of the same lengths."""
    key = run, packed.seed, packed.lengths
    if key not in memory:
        memory.clear()
        memory[key] = run(packed)
    return memory[key]


def _one_bit(run: Run, packed: Packed):
    """With more than one document in a stream, the first element of the last one's y moves by one bit."""
    found = run(packed)
    if len(packed.lengths) > 1:
        y = found["y"][-1].clone()
        y[0, 0] = torch.nextafter(y[0, 0], torch.full_like(y[0, 0], torch.inf))
        found = {**found, "y": [*found["y"][:-1], y]}
    return found


def _plant(change: Callable, prefix: str) -> Callable:
    def fault(operation: Operation) -> Operation:
        return replace(operation, run=lambda packed: change(operation.run, packed))

    def wrap(part):
        return Wrapped(part, operations=tuple(fault(o) for o in part.operations if o.name.startswith(prefix)))

    return wrap


def _needs(prefix: str) -> Callable[[Subject], str]:
    def why(subject: Subject) -> str:
        found = any(o.name.startswith(prefix) for o in subject.operations.operations)
        return "" if found else f"no operation's name begins with {prefix!r}"

    return why


def _fault(name: str, sentence: str, change: Callable, prefix: str = "", modelled_on: str = "") -> Mutant:
    return Mutant(
        name, sentence, "operations", "invariance", _plant(change, prefix), _needs(prefix), "streams", modelled_on
    )


MUTANTS = (
    _fault("stream's mean leaks", "a mean over the whole stream reaches every row", _mean_leaks),
    _fault("place in the stream", "positions are counted from the start of the stream", _place_in_stream, "RoPE",
           "huggingface/nanoVLM#201"),
    _fault("one token over the edge", "attention sees the last token of another document", _over_the_edge, "attention",
           "huggingface/trl#784"),
    _fault("K split by M", "a product of many rows is summed over halves of K", _split_k, "frozen linear, deep"),
    _fault("tile by number of rows", "a reduction's tile depends on the number of rows", _tile_by_rows, "RMSNorm"),
    _fault("second tile of the stream", "tiles but the first have less precision", _second_tile, "gate"),
    _fault("padding leaks", "the row behind a document reaches its last", _padding_leaks, "RMSNorm"),
    _fault("mask by stream place", "dropout follows a document's place", _ids_by_place, "LoRA linear, dropout"),
    _fault("result kept by shape", "a result is given again for every stream of one shape", _kept),
    _fault("one bit of one row", "in a batch one element is one unit in the last place away", _one_bit, "frozen linear"),
)  # fmt: skip
