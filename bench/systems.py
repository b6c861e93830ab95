"""The systems of the step level by name, and how each is built.

A name is a base and what is added to it: ``frozen``, ``peft`` or ``fastlora``, then ``+compile`` (whole model) or ``+layers`` (a layer
at a time), ``+liger``, ``+ckpt``, ``+r128``, ``+dropout``, ``+t2048`` (tokens a step), ``+rows`` (uneven short rows), ``+library`` (the longer
length distribution), and of a single base ``+float`` (no exact sums), ``+nonexact`` (bench/nonexact.py), ``+align64`` (fastlora) or ``+flex``,
``+fa2`` (attention for PEFT's packing), ``+fp32`` (PEFT's adapters in fp32, as it makes them unless told otherwise; without it they have
the base's dtype, its fastest setting).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import fastlora
from bench import nonexact, peers, workload
from bench.shapes import Shape, build
from fastlora import blocks, packing, stream
from fastlora.data import Row
from fastlora.errors import InputError
from fastlora.exact import discard, exact
from fastlora.invariant import make_invariant
from fastlora.ops import backend
from fastlora.setup import Objective

RATE = 1e-6  # of the optimiser steps: the weights stay what they are, nearly
DROPOUT = 0.1
BASES = ("frozen", "peft", "fastlora")
_FLAGS = {
    "compile": BASES[:2], "layers": BASES[:2], "liger": BASES[:2], "ckpt": BASES, "dropout": BASES[1:], "rows": BASES,
    "library": BASES, "float": ("fastlora",), nonexact.NAME: ("fastlora",), "flex": BASES[:2], "fa2": BASES[:2],
    "fp32": ("peft",),
}  # fmt: skip
# What a plain fastlora system can do on the same model, to say what exactness costs.
OTHERS = (frozenset({"float"}), frozenset({"float", nonexact.NAME}))
_NUMBERS = {"r": BASES[1:], "t": BASES, "align": ("fastlora",), "cap": BASES}


@dataclass(frozen=True)
class Spec:
    """A system by its parts; see the module's text."""

    name: str
    base: str
    flags: frozenset[str]
    rank: int = 16
    tokens: int = 8192
    alignment: int | None = None
    cap_gib: int | None = None

    @property
    def dropout(self) -> float:
        """The adapter's dropout."""
        return DROPOUT if "dropout" in self.flags else 0.0

    @property
    def lengths(self) -> str:
        """Name of the length distribution of short rows."""
        return "library" if "library" in self.flags else "demo"

    def aligned(self, device: torch.device | str) -> int:
        """Tokens to which this system pads a row."""
        if self.base != "fastlora":
            return 1
        return self.alignment or stream.alignment_for(torch.device(device).type)

    def rows(self, vocabulary: int, device: torch.device | str) -> list[Row]:
        """What one step is fed."""
        if "rows" in self.flags:
            return workload.short_rows(self.lengths, self.tokens, vocabulary, self.aligned(device))
        return workload.full_rows(self.tokens, vocabulary)


def parse(name: str, *, tokens: int = 8192, rank: int = 16) -> Spec:
    """The system of that name; ``tokens`` and ``rank`` where it says none.

    Raises:
        InputError: an unknown base or part, or a part that this base does not have.
    """
    base, *parts = name.split("+")
    if base not in BASES:
        raise InputError(f"systems: {name!r} begins with none of {', '.join(BASES)}")
    flags, numbers = set(), {}
    for part in parts:
        number = re.fullmatch(r"([a-z]+)(\d+)", part)
        if part in _FLAGS and base in _FLAGS[part]:
            flags.add(part)
        elif number and number[1] in _NUMBERS and base in _NUMBERS[number[1]] and int(number[2]) > 0:
            numbers[number[1]] = int(number[2])
        else:
            known = [n for n in _FLAGS if base in _FLAGS[n]] + [f"{n}<number>" for n in _NUMBERS if base in _NUMBERS[n]]
            raise InputError(f"systems: {name!r}: {base} has no part {part!r}; allowed are {', '.join(known)}")
    if "library" in flags:
        flags.add("rows")
    if nonexact.NAME in flags:
        flags.add("float")
    return Spec(
        name, base, frozenset(flags), numbers.get("r", rank), numbers.get("t", tokens), numbers.get("align"), numbers.get("cap")
    )


@dataclass
class Running:
    """A built system.

    Attributes:
        compute: forward and backward of a step; gradients are left pending.
        clear: drops them.
        update: the optimiser's step on them, and drops them; None for a frozen model.
        supervised: tokens with a loss in a step; padded: tokens computed; tokens: real ones.
        notes: what a reader has to know.
        others: the same step in another way on the same model, by the system's name: for a comparison turn by turn.
    """

    compute: Callable[[], None]
    clear: Callable[[], None]
    update: Callable[[], None] | None
    supervised: int
    tokens: int
    padded: int
    notes: list[str] = field(default_factory=list)
    others: dict[str, Callable[[], None]] = field(default_factory=dict)

    def step(self) -> None:
        """Forward and backward, gradients dropped: what the frozen model does too."""
        self.compute()
        self.clear()

    def full_step(self) -> None:
        """Forward, backward and the optimiser's step."""
        self.compute()
        self.update()

    def close(self) -> None:
        """Let go of everything, so that the memory can be freed; a model that goes has nothing to be put back."""
        self.compute = self.clear = self.update = None
        self.others = {}


def start(spec: Spec, shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Running:
    """Build a system.

    Raises:
        InputError: an optional package that it needs is not installed, or the library refuses what was asked.
    """
    if spec.base == "fastlora":
        return adapted(spec, build(shape, device, dtype), device)
    return _transformers(spec, shape, device, dtype)


def _checkpoint(model: nn.Module, spec: Spec) -> None:
    if "ckpt" in spec.flags:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _transformers(spec: Spec, shape: Shape, device, dtype) -> Running:
    """The frozen model, or PEFT's; transformers' own forward and loss."""
    attention = "sdpa"
    if "flex" in spec.flags:
        attention = "flex_attention"
    if "fa2" in spec.flags:
        peers.require(peers.FLASH, spec.name)
        attention = "flash_attention_2"
    model = build(shape, device, dtype, attention=attention)
    _checkpoint(model, spec)
    patch = peers.Patched(model) if "liger" in spec.flags else None
    adapted = peers.add_peft(model, spec.rank, spec.dropout, fp32="fp32" in spec.flags) if spec.base == "peft" else model
    call = adapted
    if "compile" in spec.flags:
        call = peers.compiled(adapted)
    if "layers" in spec.flags:
        call = peers.compile_layers(adapted)
    rows = spec.rows(shape.vocabulary, device)
    packed = "rows" in spec.flags
    inputs = workload.padding_free(rows, device) if packed else workload.batch_of(rows, device)
    if spec.base == "frozen":
        ids = inputs.pop("input_ids")
        embed = model.get_input_embeddings()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    supervised, tokens = workload.supervised_tokens(rows), sum(map(len, rows))

    def compute() -> None:
        with patch.active() if patch else contextlib.nullcontext():
            if spec.base == "frozen":
                # A model with adapters needs the gradient down to its first layer; so does this one.
                inputs["inputs_embeds"] = embed(ids).detach().requires_grad_()
            call(**inputs, num_items_in_batch=supervised).loss.backward()

    def clear() -> None:
        inputs.pop("inputs_embeds", None)
        for parameter in trained:
            parameter.grad = None

    update = None
    if trained:
        optimizer = torch.optim.AdamW(trained, RATE, fused=torch.device(device).type == "cuda")

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

    return Running(compute, clear, update, supervised, tokens, tokens, [f"attention {attention}"])


def adapted(spec: Spec, model: nn.Module, device, rows: list[Row] | None = None) -> Running:
    """The trainer's own pieces: inject, make_invariant, fuse, Objective, exact, packing, AdamW. ``rows``: of a step, if not the system's."""
    kind = torch.device(device).type
    rows = spec.rows(model.config.vocab_size, device) if rows is None else rows
    alignment = spec.aligned(device)
    config = fastlora.LoraConfig(r=spec.rank, lora_alpha=spec.rank, lora_dropout=spec.dropout)
    fastlora.inject(model, config, seed=0)
    peers.random_b(model, spec.rank, torch.Generator(device).manual_seed(2))
    _checkpoint(model, spec)
    notes = prepare(model, spec)
    objective, optimizer = Objective(model), fastlora.AdamW(model, RATE)
    ids = packing.sample_ids(rows)
    batches = [
        packing.collate([rows[i] for i in cut], [ids[i] for i in cut], alignment, device, seed=0, step=1)
        for cut in packing.plan(rows, spec.tokens, alignment)
    ]

    def enter(flags: frozenset[str]) -> None:
        """Refuse, before anything runs, batches that cannot be run so."""
        for batch in batches:
            with around_batches(flags)(batch.stream):
                pass

    enter(spec.flags)
    supervised = sum(batch.supervised for batch in batches)

    def compute(flags: frozenset[str] = spec.flags) -> None:
        one, around = blocks.single_thread() if kind == "cpu" else contextlib.nullcontext(), around_batches(flags)
        with one, contextlib.nullcontext() if "float" in flags else exact(model):
            for batch in batches:
                with stream.use(batch.stream), around(batch.stream):
                    objective(batch).backward()

    def clear(flags: frozenset[str] = spec.flags) -> None:
        if "float" in flags:
            optimizer.zero_grad(set_to_none=True)
        else:
            discard(model)

    def step(flags: frozenset[str]) -> None:
        compute(flags)
        clear(flags)

    others = {}
    for flags in () if spec.flags else OTHERS:
        with contextlib.suppress(InputError):  # documents of several lengths, or no fused layers: there is no such step
            if nonexact.NAME not in flags or notes:
                enter(flags)
                others["+".join(("fastlora", *sorted(flags)[-1:]))] = functools.partial(step, flags)

    def undropped() -> None:
        model.eval()
        try:
            step(spec.flags)
        finally:
            model.train()

    if spec.flags == {"dropout"}:
        others[spec.name.replace("+dropout", "")] = undropped

    def update() -> None:
        optimizer.step(supervised_tokens=supervised)
        optimizer.zero_grad(set_to_none=True)

    padded = sum(batch.stream.total for batch in batches)
    return Running(compute, clear, update, supervised, sum(map(len, rows)), padded, notes, others)


def around_batches(flags: frozenset[str]) -> Callable[[stream.Stream], contextlib.AbstractContextManager]:
    """What stands around the forward and backward of each micro-batch of a fastlora system."""
    return nonexact.active if nonexact.NAME in flags else lambda of: contextlib.nullcontext()


def prepare(model: nn.Module, spec: Spec | None = None) -> list[str]:
    """What the trainer does with an injected model before its first step; one line about fused layers, or none.

    ``make_invariant`` fuses on a GPU. Where the kernels run in the interpreter, layers are fused here.

    Raises:
        InputError: the system is made of fused layers, and these are not.
    """
    fused, weight = make_invariant(model).fused, next(model.parameters())
    if fused is None and backend.explain(weight.device, weight.dtype)[0] == "triton":
        from fastlora.fuse import fuse

        fused = fuse(model)
    if fused is None and spec is not None and nonexact.NAME in spec.flags:
        raise InputError(f"{spec.name}: it is made of fused layers; on {weight.device.type} the kernels do not run")
    model.train()
    return [] if fused is None else [fused.line()]
