"""Faults of order and of accumulation in one LoRA linear, and of what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import CUDA, INTERPRETER, Mutant, Wrapped, no_bits, rows_of
from verify.subject import GRAD, LinearInputs, LinearResult

CHUNK = 16


def _float_sums(part):
    """Claims equal bits, and sums in floats."""
    return Wrapped(part, accumulate=lambda parts, mode: part.accumulate(parts, GRAD))


def _float_atomics(part):
    """dA is added up from chunks of tokens in fp32, in the order in which they happen to arrive."""
    arrivals = torch.Generator().manual_seed(0)

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, tokens = part.run(inputs, mode, divisor), inputs.x.shape[0]
        starts = range(0, tokens, CHUNK)
        if len(starts) < 3 or inputs.dropout:
            return result
        da = torch.zeros_like(result.da)
        for i in torch.randperm(len(starts), generator=arrivals).tolist():
            rows = slice(starts[i], starts[i] + CHUNK)
            da = da + part.run(rows_of(inputs, rows), mode, divisor).da
        return replace(result, da=da)

    return Wrapped(part, run=run)


def _float_atomics_in_a_kernel(part):
    """dA comes from a variant kernel that adds chunks of tokens to memory by floating-point atomics."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        from verify.mutants import kernels  # Triton is not installed everywhere

        result = part.run(inputs, mode, divisor)
        return replace(result, da=kernels.float_atomics(inputs, result, divisor))

    return Wrapped(part, run=run)


def _mask_by_counter(part):
    """The dropout seed counts calls."""
    counter = itertools.count()

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        return part.run(replace(inputs, seed=inputs.seed + next(counter)), mode, divisor)

    return Wrapped(part, run=run)


def _dropout_by_place(part):
    """The dropout mask follows the place in the micro-batch, not the sample."""

    def accumulate(parts, mode):
        placed = [replace(p, ids=tuple(range(len(p.ids)))) for p in parts]
        result, rows = part.accumulate(placed, mode), {}
        for own, alone in zip(parts, placed):
            single = part.accumulate([alone], mode)
            rows.update({name: single.rows[i] for i, name in enumerate(own.ids)})
        return replace(result, rows=rows)

    return Wrapped(part, accumulate=accumulate)


def _ignores_cut(part):
    """Runs one document at a time whatever it is told: equal digests that prove nothing."""

    def accumulate(parts, mode):
        single = [
            replace(p, ids=(p.ids[i],), x=[p.x[i]], dy=[p.dy[i]])
            for p in parts
            for i in range(len(p.ids))
        ]
        return part.accumulate(sorted(single, key=lambda p: p.ids), mode)

    return Wrapped(part, accumulate=accumulate)


def _part_lost(part):
    """The last micro-batch is lost when there are more than one."""
    return Wrapped(part, accumulate=lambda parts, mode: part.accumulate(parts[:-1] or parts, mode))


def _mean_over_parts(part):
    """The sums are divided by the number of micro-batches."""

    def accumulate(parts, mode):
        result = part.accumulate(parts, mode)
        return replace(result, da=result.da / len(parts), db=result.db / len(parts))

    return Wrapped(part, accumulate=accumulate)


def _sums_kept(part):
    """A whole batch at once runs out of memory behind its first document, whose sums stay."""

    def accumulate(parts, mode):
        if len(parts) > 1:
            return part.accumulate(parts, mode)
        first = replace(parts[0], ids=parts[0].ids[:1], x=parts[0].x[:1], dy=parts[0].dy[:1])
        result = part.accumulate([first, *parts], mode)
        return replace(result, ran=result.ran[1:])

    return Wrapped(part, accumulate=accumulate)


def _one_bit(part):
    """In a batch of one micro-batch, one element of dB is one unit in the last place away."""

    def accumulate(parts, mode):
        result = part.accumulate(parts, mode)
        if len(parts) > 1:
            return result
        db = result.db.clone()
        db[0, 0] = torch.nextafter(db[0, 0], torch.full_like(db[0, 0], torch.inf))
        return replace(result, db=db)

    return Wrapped(part, accumulate=accumulate)


def _not_refused(refusals):
    """One bad input is let through."""
    return lambda: tuple(replace(r, call=lambda: None) if i == 0 else r for i, r in enumerate(refusals()))


def _unnamed(refusals):
    """One refusal does not say what was wrong."""

    def blur(refusal):
        def call():
            try:
                refusal.call()
            except Exception as error:
                raise type(error)("bad input") from error

        return replace(refusal, call=call)

    return lambda: tuple(blur(r) if i == 0 else r for i, r in enumerate(refusals()))


def _splits(name: str, sentence: str, wrap: Callable, group: str = "accumulation", **more) -> Mutant:
    return Mutant(name, sentence, "linear", "splits", wrap, group=group, **more)


MUTANTS = (
    _splits("float sums", "dA and dB are summed in floats", _float_sums, group="order", unseen_on=no_bits),
    Mutant("float atomics", "dA is added up in the order in which chunks arrive", "linear", "repeat", _float_atomics,
           group="order", modelled_on="state-spaces/mamba#827"),
    Mutant("float atomics in a kernel", "a kernel adds chunks of dA by floating-point atomics: its programs' order shows",
           "linear", "repeat", _float_atomics_in_a_kernel, group="order", seen_on=(INTERPRETER, CUDA)),
    Mutant("mask by a counter", "the dropout mask is of the number of calls so far", "linear", "repeat", _mask_by_counter,
           group="order"),
    _splits("dropout by place", "the mask depends on the place in the micro-batch", _dropout_by_place, group="order",
            unseen_on=no_bits),
    _splits("one bit", "one element is one unit in the last place away when nothing is cut", _one_bit, group="order",
            unseen_on=no_bits),
    _splits("the cut is ignored", "one document at a time, always", _ignores_cut),
    _splits("last micro-batch lost", "the last micro-batch does not reach the sums", _part_lost),
    _splits("mean over micro-batches", "sums are divided by the number of micro-batches", _mean_over_parts),
    _splits("sums kept after an out-of-memory error", "a failed attempt's first document is counted twice", _sums_kept),
    Mutant("bad input let through", "one bad input is not refused", "refusals", "guards", _not_refused, group="trainer"),
    Mutant("refusal without a name", "one refusal does not say what was wrong", "refusals", "guards", _unnamed,
           group="trainer"),
)  # fmt: skip
