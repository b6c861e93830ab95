"""What a planted fault is, and how it is put into a part of a subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from verify.oracle.linear import lora_linear_backward, lora_linear_forward
from verify.subject import LinearInputs, LinearResult, Subject

# The kinds of faults, in the order of the kill table.
GROUPS = (
    "maths", "indexing", "precision", "order", "accumulation", "optimiser", "files", "trainer", "injection", "streams",
)  # fmt: skip
PARTS = ("linear", "optimizer", "trainer", "operations", "files", "refusals")
CPU, INTERPRETER, CUDA = "cpu", "interpreter", "cuda"
EVERYWHERE = (CPU, INTERPRETER, CUDA)


def backend_of(subject: Subject) -> str:
    """``cuda``, ``interpreter`` or ``cpu``."""
    return CUDA if subject.device == "cuda" else INTERPRETER if "interpreter" in subject.tags else CPU


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Attributes:
        part: one of PARTS; ``wrap`` gives that part with the fault in it.
        killer: the claim that must catch it.
        group: one of GROUPS.
        modelled_on: "owner/repository#number" of the report of a fault of this kind in a public library, or "".
        seen_on: the backends on which it can show.
        unseen_on: says why the fault cannot show on a subject; "" if it can.
    """

    name: str
    sentence: str
    part: str
    killer: str
    wrap: Callable
    unseen_on: Callable[[Subject], str] = lambda subject: ""
    group: str = "maths"
    modelled_on: str = ""
    seen_on: tuple[str, ...] = EVERYWHERE

    def plant(self, subject: Subject) -> Subject:
        """The subject with this fault. The other parts are left out, so that only it can be caught."""
        parts = {name: None for name in PARTS if hasattr(subject, name)}
        if self.part == "trainer":
            parts["optimizer"] = subject.optimizer
        return replace(subject, **{**parts, self.part: self.wrap(getattr(subject, self.part))})

    def why_unseen(self, subject: Subject) -> str:
        """Why the fault cannot show on this subject, empty if it can."""
        if backend_of(subject) not in self.seen_on:
            return f"shows on {', '.join(self.seen_on)} alone"
        if getattr(subject, self.part, None) is None:
            return f"the subject has no {self.part}"
        if self.part == "trainer" and not subject.trainer.supports_hooks:
            return "the trainer takes no hooks"
        return self.unseen_on(subject)


class Wrapped:
    """A part with some of its methods replaced; everything else is the part's own."""

    def __init__(self, part, **methods) -> None:
        self._part = part
        self.__dict__.update(methods)

    def __getattr__(self, name: str):
        return getattr(self._part, name)


Change = Callable[[LinearInputs, LinearResult, float], LinearResult]


def in_result(change: Change) -> Callable:
    """A fault of a linear that alters the result; ``change(inputs, result, divisor)``."""

    def wrap(part):
        def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
            return change(inputs, part.run(inputs, mode, divisor), divisor)

        return Wrapped(part, run=run)

    return wrap


def in_call(change: Callable[[LinearInputs], LinearInputs]) -> Callable:
    """A fault of a linear that alters the call."""

    def wrap(part):
        def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
            return part.run(change(inputs), mode, divisor)

        return Wrapped(part, run=run)

    return wrap


def base_alone(inputs: LinearInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] and dx [M, K] of the frozen layer in float64."""
    zero_b = torch.zeros_like(inputs.b)
    y = lora_linear_forward(inputs.x, inputs.weight, inputs.a, zero_b, 1.0, inputs.bias)
    return y, lora_linear_backward(inputs.dy, inputs.x, inputs.weight, inputs.a, zero_b, 1.0).dx


def rows_of(inputs: LinearInputs, rows: slice) -> LinearInputs:
    """The same call on some of its tokens."""
    return replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows], tokens=inputs.tokens[rows])


def no_bits(subject: Subject) -> str:
    """Why a fault of equal bits cannot show: the subject claims none."""
    return "" if subject.linear.bitwise_splits else "the subject claims no equal bits"


def needs(*dtypes: torch.dtype) -> Callable[[Subject], str]:
    """Unseen unless the linear works in one of ``dtypes``."""
    told = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return lambda subject: "" if set(dtypes) & set(subject.linear.dtypes) else f"needs {told}"
