"""guards: bad input is refused by name, and nothing outside a tensor is read or written."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from verify import pages
from verify.claims.invariance import Pen, same_bits
from verify.claims.outcome import Budget, Outcome
from verify.strategies import affordable, endless, short_names
from verify.subject import Refusal, Refused, Subject

NAME = "guards"
STATEMENT = (
    "Every input that must be refused is, with a message that names it, and its good neighbour is not; with every "
    "tensor in a page of NaN, inputs and new buffers alike, results have the bits they have without, and no page is "
    "touched."
)

Named = dict[str, torch.Tensor]


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """All refusals, then calls in pages, the linear and the operations by turns."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    kinds = [calls for calls in (make(subject, seed) for make in (_linear, _operations)) if calls is not None]
    if not kinds and subject.refusals is None:
        out.reason = "the subject has no LoRA linear, no operations and no list of refusals"
        return out
    if subject.refusals is None:
        out.note("refusals not tried: the subject lists none")
    else:
        found = subject.refusals()
        for refusal in found:
            _refused(subject, refusal, out)
        out.cases += 1
        out.tags |= {subject.device, *subject.tags}
        out.note(f"bad inputs refused by name: {len(found)}")
    buffers = 0
    for calls in itertools.cycle(kinds):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        where, tags, call = next(calls)
        out.cases += 1
        out.tags |= {subject.device, *tags, *subject.tags}
        try:
            buffers += _in_pages(call, out, f"{where}; {subject.name}")
        # A crash of the subject is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {where}; {subject.name}")
    out.note(f"new buffers that lay in pages: {buffers}")
    out.seconds = time.monotonic() - begun
    return out


def _refused(subject: Subject, refusal: Refusal, out: Outcome) -> None:
    """The bad call raises what it must, in words that name it; the good one does not."""
    try:
        refusal.call()
    except subject.refuses as error:
        missing = [name for name in refusal.names if name not in str(error)]
        out.check(not missing, f"{refusal.told}: refused without naming {', '.join(missing)}: {error}; {subject.name}")
    except Exception as error:
        out.fail(f"{refusal.told}: raised {type(error).__name__}, no refusal: {error}; {subject.name}")
    else:
        out.fail(f"{refusal.told}: not refused; {subject.name}")
    if refusal.allowed is None:
        return
    try:
        refusal.allowed()
    except Exception as error:
        out.fail(
            f"control: the good neighbour of '{refusal.told}' raised {type(error).__name__}: {error}; {subject.name}"
        )


# A call gets a function that puts a tensor into a page (or leaves it), and gives named results.
Call = Callable[[Callable[[torch.Tensor], torch.Tensor]], Named]


def _in_pages(call: Call, out: Outcome, where: str) -> int:
    """The call as it is, and in pages; the number of new buffers that lay in them."""
    plain, again = call(lambda t: t), call(lambda t: t)
    repeats = all(same_bits(t, again[name]) for name, t in plain.items())
    inputs: list[pages.Page] = []

    def put(tensor: torch.Tensor) -> torch.Tensor:
        inputs.append(pages.embed(tensor, is_input=True))
        return inputs[-1].view

    with pages.allocations() as made:
        guarded = call(put)
    for name, tensor in plain.items():
        if repeats and not same_bits(tensor, guarded[name]):
            bad = int((~guarded[name].isfinite() & tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            told = f"{bad} elements are NaN or infinite" if bad else "the bits differ"
            out.fail(f"{name} in pages of NaN: {told}: something outside a tensor, or never written, was read; {where}")
        elif not repeats and not torch.equal(tensor.isfinite(), guarded[name].isfinite()):
            out.fail(f"{name} in pages of NaN is not finite where it was; {where}")
    touched = [i for i, page in enumerate(inputs) if not page.intact()]
    out.check(not touched, f"an input, or memory around it, was written (tensors {touched} of the call); {where}")
    spoilt = [tuple(page.view.shape) for page in made if not page.intact()]
    out.check(not spoilt, f"memory around new buffers was written: shapes {spoilt[:3]}; {where}")
    return len(made)


def _linear(subject: Subject, seed: int) -> Iterator[tuple[str, set[str], Call]] | None:
    part = subject.linear
    if part is None:
        return None
    names = short_names(part.dtypes)

    def calls():
        for case in endless("linear", names, seed, getattr(part, "cases_a_shape", 1)):
            if case.values == "huge" or not affordable(case, part):
                continue
            inputs = case.inputs(subject.device)
            for mode in part.modes:

                def call(put, inputs=inputs, mode=mode) -> Named:
                    tensors = {
                        field.name: put(value)
                        for field in dataclasses.fields(inputs)
                        if isinstance(value := getattr(inputs, field.name), torch.Tensor)
                    }
                    try:
                        result = part.run(dataclasses.replace(inputs, **tensors), mode)
                    except Refused:
                        return {}
                    return {name: getattr(result, name) for name in ("y", "dx", "da", "db")}

                yield f"{mode}, {case!r}", {case.dtype}, call

    return calls()


def _operations(subject: Subject, seed: int) -> Iterator[tuple[str, set[str], Call]] | None:
    part = subject.operations
    if part is None or not part.operations:
        return None
    names = short_names(part.dtypes)

    def calls():
        for case, (index, operation) in zip(endless("rows", names, seed), itertools.cycle(enumerate(part.operations))):
            case = dataclasses.replace(case, operation=index, lengths=case.lengths[: part.documents])
            pen = Pen(case, operation, part.alignment, subject.device)
            packed = pen.pack([pen.document(length) for length in case.lengths], True)

            def call(put, packed=packed, operation=operation) -> Named:
                found = operation.run(dataclasses.replace(packed, x=put(packed.x), dy=put(packed.dy)))
                return {f"{name}, document {i}": t for name, values in found.items() for i, t in enumerate(values)}

            yield f"{operation.name}, {case!r}", {case.dtype}, call

    return calls()
