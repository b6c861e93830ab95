"""repeat: the same call gives the same bits, twenty times.

Between two calls memory is filled with NaN and given back, so that what a kernel leaves unwritten, or reads before it
writes, does not look the same twice. One control: another input gives other bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from verify.claims.invariance import Pen, same_bits
from verify.claims.outcome import Budget, Outcome
from verify.strategies import affordable, endless, short_names
from verify.subject import OptimizerPart, Packed, Subject

NAME = "repeat"
TIMES = 20
STATEMENT = (
    f"The same call gives the same bits {TIMES} times, forward and backward: the LoRA linear in every mode, each "
    "operation, and steps of the optimiser; between calls memory is filled with NaN."
)

Named = dict[str, torch.Tensor]
# One call: what it is, its tags, the call, and the same call on another input.
Call = tuple[str, set[str], Callable[[], Named], Callable[[], Named]]


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """The parts by turns, in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    makers = [make(subject, seed) for make in (_linear, _operations, _optimizer)]
    kinds = [calls for calls in makers if calls is not None]
    if not kinds:
        out.reason = "the subject has no LoRA linear, no operations and no optimiser"
        return out
    for calls in itertools.cycle(kinds):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        where, tags, call, other = next(calls)
        out.cases += 1
        out.tags |= {subject.device, *tags, *subject.tags}
        try:
            _repeated(call, other, out, f"{where}; {subject.name}")
        # A crash of the subject is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {where}; {subject.name}")
    out.seconds = time.monotonic() - begun
    return out


def _repeated(call: Callable[[], Named], other: Callable[[], Named], out: Outcome, where: str) -> None:
    first = {name: t.detach().clone() for name, t in call().items()}
    for i in range(2, TIMES + 1):
        again = call()
        apart = [name for name, tensor in first.items() if not same_bits(tensor, again[name])]
        if apart:
            count = int((again[apart[0]] != first[apart[0]]).sum())
            out.fail(
                f"call {i} gave other bits of {', '.join(apart)} than the first "
                f"({count} elements of {apart[0]}); {where}"
            )
            return
        _stir(again)
        del again
    moved = other()
    alive = any(not same_bits(tensor, moved[name]) for name, tensor in first.items() if tensor.numel())
    empty = not any(tensor.numel() for tensor in first.values())
    out.check(alive or empty, f"control: another input gives the same bits; {where}")


def _stir(results: Named) -> None:
    """Fill memory of the sizes that the next call will ask for with NaN, and give it back."""
    filled = [torch.full_like(t, float("nan")) for t in results.values() if t.is_floating_point() for _ in range(2)]
    del filled


def _linear(subject: Subject, seed: int) -> Iterator[Call] | None:
    part = subject.linear
    if part is None:
        return None
    names = short_names(part.dtypes)
    cases = endless("linear", names, seed, getattr(part, "cases_a_shape", 1))

    def calls() -> Iterator[Call]:
        # Numbers of any size add up in one order only if the order is fixed; integers in all.
        uneven = (c for c in cases if c.m > 1 and c.values in ("normal", "heavy", "cancelling", "lora_alone"))
        for case in (c for c in uneven if affordable(c, part)):
            inputs = case.inputs(subject.device)
            moved = dataclasses.replace(inputs, x=inputs.x * 2, dy=inputs.dy * -1)
            for mode in part.modes:

                def call(inputs=inputs, mode=mode) -> Named:
                    result = part.run(inputs, mode)
                    return {name: getattr(result, name) for name in ("y", "dx", "da", "db")}

                yield f"{mode}, {case!r}", {case.dtype}, call, lambda call=call, moved=moved: call(moved)

    return calls()


def _operations(subject: Subject, seed: int) -> Iterator[Call] | None:
    part = subject.operations
    if part is None or not part.operations:
        return None
    names = short_names(part.dtypes)

    def calls() -> Iterator[Call]:
        for case, (index, operation) in zip(endless("rows", names, seed), itertools.cycle(enumerate(part.operations))):
            case = dataclasses.replace(case, operation=index, lengths=case.lengths[: part.documents])
            pen = Pen(case, operation, part.alignment, subject.device)
            documents = [pen.document(length) for length in case.lengths]
            # The longest of the part's streams: many programs at once, where there are races to lose.
            # Where one document is all that is asked for, kernels are simulated, and the shortest has to do.
            room = (max if part.documents > 1 else min)(part.streams) - sum(pen.padded(len(d.x)) for d in documents)
            packed = pen.pack([*documents, *pen.fillers(max(room, 0))], True)
            moved = dataclasses.replace(packed, x=packed.x.flip(1), dy=packed.dy * -1)

            def call(packed: Packed = packed, operation=operation) -> Named:
                found = operation.run(packed)
                return {f"{name}, document {i}": t for name, values in found.items() for i, t in enumerate(values)}

            yield f"{operation.name}, {case!r}", {case.dtype}, call, lambda call=call, moved=moved: call(moved)

    return calls()


def _optimizer(subject: Subject, seed: int) -> Iterator[Call] | None:
    part: OptimizerPart | None = subject.optimizer
    if part is None:
        return None

    def calls() -> Iterator[Call]:
        for case in (c for c in endless("optimizer", (), seed) if c.hyper.lr):
            before, gradients = case.tensors()
            doubled = [{name: g * -1 for name, g in step.items()} for step in gradients]

            def call(gradients=gradients, before=before, case=case) -> Named:
                after = part.run({n: p.clone() for n, p in before.items()}, gradients, case.hyper)
                return {f"{name} after step {i}": p for i, step in enumerate(after, 1) for name, p in step.items()}

            yield repr(case), {"fp32"}, call, lambda call=call, doubled=doubled: call(doubled)

    return calls()
