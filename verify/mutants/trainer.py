"""Faults of a training loop, planted through its hooks: normalisation, order, dropout, idle steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.subject import Subject, TrainHooks


def _hooks(hooks: TrainHooks) -> Callable:
    def wrap(part):
        def train(case, cut, *, float_sums=False, hooks=hooks):
            return part.train(case, cut, float_sums=float_sums, hooks=hooks)

        return Wrapped(part, train=train)

    return wrap


def _case(change: Callable) -> Callable:
    """A fault in what the trainer makes of its settings."""

    def wrap(part):
        def train(case, cut, *, float_sums=False, hooks=None):
            return part.train(*change(case, cut), float_sums=float_sums, hooks=hooks)

        return Wrapped(part, train=train)

    return wrap


def _float_sums(part):
    def train(case, cut, *, float_sums=False, hooks=None):
        return part.train(case, cut, float_sums=True, hooks=hooks)

    return Wrapped(part, train=train)


def _poke_frozen(model: torch.nn.Module) -> None:
    """One unit in the last place of one frozen element."""
    frozen = next(p for p in model.parameters() if not p.requires_grad and p.dim() == 2)
    with torch.no_grad():
        frozen[0, 0] = torch.nextafter(frozen[0, 0], torch.full_like(frozen[0, 0], 9.0))


def _poke_a(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A.weight"):
            with torch.no_grad():
                parameter.mul_(1 + 2.0**-20)


def _one_tensor_stuck(part):
    """The last tensor is put back after every step."""

    def train(case, cut, *, float_sums=False, hooks=None):
        result = part.train(case, cut, float_sums=float_sums, hooks=hooks)
        name = sorted(result.before)[-1]
        return replace(result, after=[{**step, name: result.before[name]} for step in result.after])

    return Wrapped(part, train=train)


def _not_bitwise(subject: Subject) -> str:
    return "" if subject.trainer.bitwise_splits else subject.trainer.why_not


def _splits(name: str, sentence: str, wrap: Callable) -> Mutant:
    return Mutant(name, sentence, "trainer", "splits", wrap, _not_bitwise)


def _updates(name: str, sentence: str, wrap: Callable) -> Mutant:
    return Mutant(name, sentence, "trainer", "updates", wrap)


def _mean_of_means(loss: torch.Tensor, supervised: int) -> torch.Tensor:
    return loss / max(supervised, 1)


MUTANTS = (
    _splits("normalisation by micro-batch mean", "losses are means of micro-batches, averaged",
            _hooks(TrainHooks(weigh=_mean_of_means, tokens=lambda n, cut: len(cut)))),
    _splits("divided by accumulation once more", "the gradient is divided by the number of micro-batches",
            _hooks(TrainHooks(tokens=lambda n, cut: n * len(cut)))),
    _splits("last micro-batch dropped", "a short last micro-batch is left out",
            _hooks(TrainHooks(order=lambda cut: cut[:-1] or cut))),
    _splits("float sums in training", "gradients are summed in floats", _float_sums),
    _splits("dropout redrawn a micro-batch", "the dropout seed counts micro-batches",
            _hooks(TrainHooks(seed=lambda seed, i: seed + i))),
    _splits("dropout ignored", "dropout is always 0",
            _case(lambda case, cut: (replace(case, dropout=0.0), cut))),
    _splits("cut ignored in training", "one sequence at a time, always",
            _case(lambda case, cut: (case, tuple((i,) for i in sorted(j for g in cut for j in g))))),
    _splits("rate of 0", "the learning rate is 0: every cut gives one digest",
            _case(lambda case, cut: (replace(case, hyper=replace(case.hyper, lr=0.0)), cut))),
    _splits("one tensor stuck", "one adapter tensor never moves", _one_tensor_stuck),
    _updates("frozen weight touched", "one frozen element moves by one unit in the last place",
             _hooks(TrainHooks(before_step=_poke_frozen))),
    _updates("A moves at step 1", "A moves by 2^-20 of itself though its gradient is 0",
             _hooks(TrainHooks(before_step=_poke_a))),
    _updates("one tensor not updated", "one adapter tensor is not stepped", _one_tensor_stuck),
)  # fmt: skip
