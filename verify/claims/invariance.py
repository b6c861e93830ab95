"""invariance: an operation gives a document the same bits alone, in a batch, at any place, beside anything.

With the controls without which equal bits prove nothing: results are finite and not all zero, another input gives other
bits, and the streams that ran differ in length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator

import torch

from verify.claims.outcome import Budget, Outcome
from verify.products import products_of
from verify.strategies import DTYPES, RowsCase, endless, short_names
from verify.subject import DOCUMENT, ROW, Operation, Packed, Subject

NAME = "invariance"
STATEMENT = (
    "Each operation alone gives a document the same bits, forward and backward, alone, in a batch, in another order, "
    "at another place of a stream, beside other documents and garbage padding, in streams of every length; a row-wise "
    "operation gives each row the same bits also when its document is cut."
)

# Finite, with finite squares. Attention multiplies two of them, and its padding is real rows in exponents.
GARBAGE = {ROW: {torch.float16: 2.0**13}, DOCUMENT: {torch.float16: 2.0**10}}
MOST_GARBAGE = {ROW: 1e18, DOCUMENT: 1e4}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal dtype, shape and bits: 0 and -0 differ, and a NaN equals itself."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    kind = _INTEGERS.get(one.element_size(), torch.uint8)
    return torch.equal(one.contiguous().view(kind), two.contiguous().view(kind))


@dataclasses.dataclass(frozen=True)
class Document:
    id: int
    x: torch.Tensor
    dy: torch.Tensor


class Pen:
    """Draws a case's documents, fillers and garbage, and packs streams of them."""

    def __init__(self, case: RowsCase, operation: Operation, alignment: int, device: str) -> None:
        self.case, self.operation, self.alignment, self.device = case, operation, alignment, device
        self.draw, self.dtype = torch.Generator().manual_seed(case.seed), DTYPES[case.dtype]
        self.made = 0

    def document(self, length: int) -> Document:
        """``length`` rows of normal numbers and their upstream gradient."""
        self.made += 1
        shapes = (length, self.operation.features), (length, self.operation.outputs)
        x, dy = (torch.randn(shape, generator=self.draw) for shape in shapes)
        return Document(1000 + self.made, (x * self.case.size).to(self.dtype), dy.to(self.dtype))

    def fillers(self, rows: int) -> list[Document]:
        """Other documents that take exactly ``rows`` rows with their padding."""
        found = []
        while rows > 0:
            length = min(rows, int(torch.randint(1, 400, (), generator=self.draw)))
            found.append(self.document(length))
            rows -= self.padded(length)
        return found

    def padded(self, length: int) -> int:
        return -(-length // self.alignment) * self.alignment

    def _padding(self, rows: int, columns: int, garbage: bool) -> torch.Tensor:
        if not garbage:
            return torch.zeros(rows, columns, dtype=self.dtype)
        sees = self.operation.sees
        size = GARBAGE[sees].get(self.dtype, MOST_GARBAGE[sees]) * self.case.garbage * self.operation.garbage
        # At most 4 of these away from 0, where fp16 has room for it.
        return (torch.randn(rows, columns, generator=self.draw).clamp(-4, 4) * size).to(self.dtype)

    def pack(self, documents: list[Document], garbage: bool) -> Packed:
        """One stream of ``documents``."""
        xs, dys = [], []
        for document in documents:
            length = len(document.x)
            rest = self.padded(length) - length
            xs += [document.x, self._padding(rest, document.x.shape[1], garbage)]
            dys += [document.dy, self._padding(rest, document.dy.shape[1], garbage and self.operation.sees == ROW)]
        x, dy = torch.cat(xs).to(self.device), torch.cat(dys).to(self.device)
        lengths, ids = tuple(len(d.x) for d in documents), tuple(d.id for d in documents)
        return Packed(lengths, ids, self.alignment, x, dy, self.case.seed)


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """The operations by turns, on documents in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    part = subject.operations
    if part is None or not part.operations:
        out.reason = "the subject names no operations"
        return out
    names = short_names(part.dtypes)
    tried, totals = Counter(), set()
    called: dict[str, set[str]] = {}
    for case, (index, operation) in zip(endless("rows", names, seed), itertools.cycle(enumerate(part.operations))):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        case = dataclasses.replace(case, operation=index, lengths=case.lengths[: part.documents])
        out.cases += 1
        out.tags |= {subject.device, case.dtype, *subject.tags}
        tried[operation.name] += 1
        where = f"{operation.name}, {subject.name}, {case!r}"
        try:
            _one(subject, operation, case, out, where, totals)
            if operation.name not in called:
                pen = Pen(case, operation, part.alignment, subject.device)
                called[operation.name] = products_of(operation.run, pen.pack([pen.document(case.lengths[0])], False))
        # A crash of the subject is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {where}")
    out.note("cases: " + "; ".join(f"{name} {count}" for name, count in tried.items()))
    left = [o.name for o in part.operations if o.name not in tried]
    if left:
        out.note(f"the budget ended before these were tried: {', '.join(left)}")
    callers: dict[str, list[str]] = {}
    for name, products in called.items():
        if products:
            callers.setdefault(", ".join(sorted(products)), []).append(name)
    for products, operations in callers.items():
        seen = "some bits differed" if out.failures else "no row's bits depended on M in these streams"
        out.note(f"torch's own products ({products}) are called by {'; '.join(operations)}: {seen}")
    out.note(f"streams of {min(totals, default=0)} to {max(totals, default=0)} rows")
    out.check(out.cases == 0 or len(totals) > 1, "control: all streams had one length; they prove nothing")
    out.seconds = time.monotonic() - begun
    return out


def _one(subject: Subject, operation: Operation, case: RowsCase, out: Outcome, where: str, totals: set[int]) -> None:
    """Every document of a case in every stream against itself alone."""
    part = subject.operations
    pen = Pen(case, operation, part.alignment, subject.device)
    documents = [pen.document(length) for length in case.lengths]

    def result(packed: Packed) -> list[dict[str, torch.Tensor]]:
        totals.add(len(packed.x))
        found = operation.run(packed)
        return [{name: values[i] for name, values in found.items()} for i in range(len(packed.lengths))]

    alone = {d.id: result(pen.pack([d], False))[0] for d in documents}
    for document in documents:
        _is_a_result(document, alone[document.id], out, where)
    first = documents[0]
    other = dataclasses.replace(first, x=-first.x.flip(1), dy=first.dy.flip(1) * 0.5)
    again = result(pen.pack([other], False))[0]
    for name, tensor in again.items():
        same = same_bits(tensor, alone[first.id][name])
        out.check(not same, f"control: another input gives the same {name}; {where}")

    for told, packed, threads in _streams(pen, documents, part.streams, case):
        with _threads(threads if subject.device == "cpu" else None):
            found = result(packed)
        for name, own in zip(packed.ids, found):
            if name in alone:
                _same(own, alone[name], f"document of {packed.lengths[packed.ids.index(name)]} rows", told, out, where)
    if operation.sees == ROW:
        _rows_alone(pen, documents, alone, result, case, out, where)


def _is_a_result(document: Document, found: dict, out: Outcome, where: str) -> None:
    for name, tensor in found.items():
        out.check(bool(tensor.isfinite().all()), f"control: {name} alone is not finite; {where}")
        # One token is its own attention: a query that chooses nothing has no gradient, but values have.
        out.check(len(document.x) < 8 or bool(tensor.any()), f"control: {name} alone is all zeros; {where}")


def _streams(pen: Pen, documents: list, sizes: tuple[int, ...], case: RowsCase) -> Iterator[tuple[str, Packed, int]]:
    """(name, stream, threads on a CPU) of everything that a document is put into."""
    for document in documents:
        yield "alone beside garbage padding", pen.pack([document], True), 1
    yield "a batch", pen.pack(documents, False), 1
    yield "a batch in reverse, beside garbage padding, on two threads", pen.pack(documents[::-1], True), 2
    for i, size in enumerate(sizes):
        document = documents[(case.place + i) % len(documents)]
        room = (size - pen.padded(len(document.x))) // pen.alignment
        if room >= 0:
            before = (case.place % (room + 1)) * pen.alignment
            after = room * pen.alignment - before
            stream = [*pen.fillers(before), document, *pen.fillers(after)]
            yield f"row {before} of a stream of {size}", pen.pack(stream, True), 1 + i % 2


def _rows_alone(pen: Pen, documents, alone, result, case: RowsCase, out: Outcome, where: str) -> None:
    """A document cut in two, and one of its rows alone."""
    for document in documents:
        length = len(document.x)
        at, row = case.place % length, case.seed % length
        cut = {f"row {row} alone": [slice(row, row + 1)]}
        if at:
            cut[f"cut at row {at}"] = [slice(0, at), slice(at, length)]
        for told, parts in cut.items():
            pieces = [Document(document.id + 500 + i, document.x[p], document.dy[p]) for i, p in enumerate(parts)]
            for piece, rows in zip(pieces, parts):
                own = result(pen.pack([piece], True))[0]
                wanted = {name: tensor[rows] for name, tensor in alone[document.id].items()}
                _same(own, wanted, f"rows {rows.start} to {rows.stop} of {length}", told, out, where)


def _same(found: dict, wanted: dict, what: str, told: str, out: Outcome, where: str) -> None:
    for name, tensor in wanted.items():
        if not same_bits(found[name], tensor):
            out.fail(f"{name}, {what}: other bits in '{told}' than alone{_first(found[name], tensor)}; {where}")


def _first(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Where two tensors differ first, if their form is one."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f" ({found.dtype} {tuple(found.shape)} for {wanted.dtype} {tuple(wanted.shape)})"
    apart = ~((found == wanted) | (found.isnan() & wanted.isnan()))
    if not bool(apart.any()):
        return " (the sign of a zero)"
    place = tuple(apart.nonzero()[0].tolist())
    told = f"{float(found[place])!r} for {float(wanted[place])!r}"
    return f" (first at {list(place)}: {told}; {int(apart.sum())} elements)"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
