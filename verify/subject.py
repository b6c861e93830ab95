"""The protocol by which a kernel, an optimiser or a trainer is put before the claims.

A :class:`Subject` bundles up to four parts; a part that is None leaves its claims `not tried`. A
part declares where it rounds and whether it claims the same bits under every cut of a batch. An
example that imports nothing of this project's library is ``verify/plain.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from verify.graphs import Roundings
from verify.oracle.adamw import Hyper

GRAD, EXACT = "grad", "exact"


class Refused(Exception):
    """A documented refusal (a saturated sum, say): the subject named a limit and stopped; a pass."""


class BadSubject(ValueError):
    """Bad input to the harness itself: one plain line, exit 2."""


@dataclass(frozen=True)
class LinearInputs:
    """One call of a LoRA linear: x [M, K], weight [N, K], a [r, K], b [N, r], bias [N], dy [M, N].

    x, weight, bias and dy are of the working dtype (any strides), a and b fp32. The subject makes
    its own scale from alpha, the rank and ``rslora``, as it would from a user's configuration.
    ``tokens`` (int64 [M]) and ``seed`` name the dropout mask; ``lengths`` cuts the M tokens into
    documents.
    """

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    alpha: float
    rslora: bool
    dropout: float
    tokens: torch.Tensor
    seed: int

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class LinearResult:
    """y [M, N], dx [M, K], da [r, K], db [N, r]; ``keep`` bool [M, K]: the dropout mask it used."""

    y: torch.Tensor
    dx: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor
    keep: torch.Tensor | None = None


class LinearPart(Protocol):
    """A LoRA linear with its backward.

    Optional attributes:

    - ``cases_a_shape`` (default 1): how many cases in a row have the same K, N, r and dtype, for kernels that are
      compiled for each;
    - ``most_products`` (default: any): the largest M x K x N of claims that call a case many times, for kernels that
      are simulated;
    - ``operators(inputs)``: yields (registered torch operator, arguments) of one call, for torch's opcheck;
    - ``world(ranks, mode)``: like ``accumulate`` with a list of micro-batches for each process, and the gradients
      summed as an all-reduce would.
    """

    modes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    bitwise_splits: bool

    def roundings(self, dtype: torch.dtype, mode: str) -> Roundings:
        """Where it rounds for a working dtype in a mode ("grad" or "exact")."""

    def run(self, inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        """Forward and backward; da and db divided by ``divisor`` (used with "exact" only).

        Raises:
            Refused: a documented refusal.
        """

    def accumulate(self, parts: list[Documents], mode: str) -> SplitResult:
        """Gradients over micro-batches, each a list of documents, as one optimiser step would see."""


@dataclass(frozen=True)
class Documents:
    """One micro-batch of a single linear: whole documents, ids naming them whatever the cut.

    ``x`` and ``dy`` are lists of [length, K] and [length, N], one entry a document.
    """

    ids: tuple[int, ...]
    x: list[torch.Tensor]
    dy: list[torch.Tensor]
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    dropout: float
    seed: int


@dataclass(frozen=True)
class SplitResult:
    """da, db summed over everything, each document's y and dx by id, and the rows of each forward."""

    da: torch.Tensor
    db: torch.Tensor
    rows: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ran: tuple[int, ...]


class OptimizerPart(Protocol):
    """AdamW over fp32 tensors A and B, moments and parameters stored in fp32.

    ``arithmetic``: what single operations round to (fp32 or float64). ``clip_epsilon``: what the
    clip rule adds to the norm (torch: 1e-6), 0 for none.
    """

    arithmetic: torch.dtype
    clip_epsilon: float

    def run(
        self,
        parameters: dict[str, torch.Tensor],
        gradients: list[dict[str, torch.Tensor]],
        hyper: Hyper,
    ) -> list[dict[str, torch.Tensor]]:
        """Parameters after each step, given each step's gradients. Names end in lora_A or lora_B."""


@dataclass(frozen=True)
class TrainCase:
    """Training of a tiny random causal model: what is fixed while the cut of each batch varies.

    ``lengths``: tokens of every sequence of the global batch, the same for each step (with other
    tokens). ``prompt``: leading tokens of each that are not supervised. ``masked``: indices of sequences of which no
    token is. ``world``: processes among which the micro-batches are dealt in turn (for trainers that simulate them).
    ``head``: the output head has an adapter too (for trainers that say ``heads``). The adapter's alpha is its rank: the scale is 1.
    """

    lengths: tuple[int, ...]
    steps: int = 2
    rank: int = 3
    dropout: float = 0.0
    seed: int = 0
    prompt: int = 2
    hidden: int = 48
    threads: int = 1
    masked: tuple[int, ...] = ()
    world: int = 1
    head: bool = False
    hyper: Hyper = field(default_factory=lambda: Hyper(lr=2e-2))


# A cut: for each micro-batch, in order, the indices of its sequences.
Cut = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainHooks:
    """Where the harness plants faults into a training loop; a correct run leaves every field alone.

    ``weigh(loss_sum, supervised)`` sees each micro-batch's loss before its backward; ``tokens``
    maps the step's supervised count to what the optimiser is told; ``sample_ids(index, place)``
    names a sequence; ``order`` may drop, repeat or regroup the micro-batches; ``seed`` maps the
    dropout seed at micro-batch i.
    """

    weigh: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    tokens: Callable[[int, Cut], float] | None = None
    order: Callable[[Cut], Cut] | None = None
    seed: Callable[[int, int], int] | None = None
    after_backward: Callable[[torch.nn.Module, int], None] | None = None
    before_step: Callable[[torch.nn.Module], None] | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind; all tensors are copies on the CPU.

    ``ran``: for each step the padded tokens of each forward that really happened. ``gradients``:
    those of each step as the optimiser saw them. ``frozen``: digest of all frozen weights before
    and after.
    """

    before: dict[str, torch.Tensor]
    after: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]
    ran: tuple[tuple[int, ...], ...]
    frozen: tuple[str, str]


@dataclass(frozen=True)
class WholeRun:
    """What the user's own command or class trained from files.

    ``ran``: for each step the padded tokens of each micro-batch in its log. ``norm``: the gradient
    norm it logged for step 1.
    """

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    ran: tuple[tuple[int, ...], ...]
    norm: float


class TrainerPart(Protocol):
    """A training loop over a tiny model.

    ``supports_hooks`` False: faults of a loop cannot be planted. ``run`` may be None: then no whole
    run from files is tried. ``alignment``: tokens to which it pads a sequence. Optional ``worlds`` (default only 1):
    numbers of processes that it simulates. Optional ``heads`` (default False): it adapts the output head if a case says so.
    """

    alignment: int
    bitwise_splits: bool
    why_not: str
    supports_hooks: bool
    run: Callable[[TrainCase, int, tuple[int, ...]], WholeRun] | None

    def train(
        self,
        case: TrainCase,
        cut: Cut,
        *,
        float_sums: bool = False,
        hooks: TrainHooks | None = None,
    ) -> TrainResult:
        """Train from the case's seed with every global batch cut as told."""


ROW, DOCUMENT = "row", "document"


@dataclass(frozen=True)
class Packed:
    """One stream of documents: x [T, features] and dy [T, outputs] in the working dtype.

    Document i has ``lengths[i]`` real rows and is padded to a multiple of ``alignment``; what stands in padding is
    finite, random and large. ``ids`` name documents whatever the stream. An operation draws its weights from ``seed``.
    """

    lengths: tuple[int, ...]
    ids: tuple[int, ...]
    alignment: int
    x: torch.Tensor
    dy: torch.Tensor
    seed: int

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the real rows of every document."""
        found, start = [], 0
        for length in self.lengths:
            found.append((start, start + length))
            start += -(-length // self.alignment) * self.alignment
        return tuple(found)

    def cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The real rows [length, ...] of every document, in order, of a tensor [T, ...]."""
        return [tensor[start:stop] for start, stop in self.spans]


@dataclass(frozen=True)
class Operation:
    """One operation that claims the same bits for a document whatever is in the stream beside it.

    Attributes:
        name: unique in the subject.
        features, outputs: columns of x and dy.
        run: from a stream to named lists of tensors, each list with one tensor a document in the order of the
            stream: results ("y" [length, outputs]) and input gradients ("dx" [length, features]).
        sees: which rows a row's result may depend on: ROW, itself alone; DOCUMENT, those of its document and its
            place in it. The padding of DOCUMENT operations has dy = 0, as below any loss; elsewhere it is garbage.
        garbage: times as much of it as usual: below 1 for an operation that multiplies its input before it normalises it, where
            padding would overflow fp16 by itself, and an infinite number times a gradient of 0 is none.
    """

    name: str
    features: int
    outputs: int
    run: Callable[[Packed], dict[str, list[torch.Tensor]]]
    sees: str = DOCUMENT
    garbage: float = 1.0


class OperationsPart(Protocol):
    """Operations, each proved alone by the claim ``invariance``.

    ``alignment``: rows to which a document is padded. ``streams``: totals of rows (multiples of the alignment) in
    which the documents are tried. ``documents``: how many a case judges.
    """

    alignment: int
    streams: tuple[int, ...]
    documents: int
    dtypes: tuple[torch.dtype, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Refusal:
    """One bad input and what must happen: ``call`` raises one of the subject's ``refuses`` and the message holds every
    word of ``names``. ``allowed``: the same call with a good value, which must not be refused (None: there is none)."""

    told: str
    names: tuple[str, ...]
    call: Callable[[], object]
    allowed: Callable[[], object] | None = None


class FilesPart(Protocol):
    """Adapters in PEFT's files. ``config`` holds fields of PEFT's ``LoraConfig`` by their names; models are those of
    transformers, changed in place and returned. An optional method ``merge_and_back(model)`` merges and unmerges.
    """

    def attach(self, model: torch.nn.Module, config: dict, seed: int) -> torch.nn.Module:
        """Give the model adapters whose A and B are both random."""

    def save(self, model: torch.nn.Module, folder: str) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``."""

    def load(self, model: torch.nn.Module, folder: str) -> torch.nn.Module:
        """Attach what these two files hold."""

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """W + s B A in place of every adapted W."""

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A and B by the names they have in PEFT's file."""


@dataclass(frozen=True)
class Subject:
    """What is judged. ``device`` is "cpu" or "cuda"; ``tags`` are further words for ``--require``.

    ``refusals`` lists bad inputs, each refused by an exception of one of the types ``refuses``.
    """

    name: str
    device: str
    linear: LinearPart | None = None
    optimizer: OptimizerPart | None = None
    trainer: TrainerPart | None = None
    tags: tuple[str, ...] = ()
    operations: OperationsPart | None = None
    files: FilesPart | None = None
    refusals: Callable[[], tuple[Refusal, ...]] | None = None
    refuses: tuple[type[BaseException], ...] = ()
