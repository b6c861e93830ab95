"""Faults of a training loop, planted through its hooks: normalisation, order, dropout, idle steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.subject import Cut, Subject, TrainCase, TrainHooks


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


def _counted(tokens: Callable) -> Callable:
    """The optimiser is told ``tokens(case, cut)``."""

    def wrap(part):
        def train(case, cut, *, float_sums=False, hooks=None):
            hooks = TrainHooks(tokens=lambda supervised, own: tokens(case, own))
            return part.train(case, cut, float_sums=float_sums, hooks=hooks)

        return Wrapped(part, train=train)

    return wrap


def _padded(case: TrainCase, cut: Cut) -> float:
    """Tokens of micro-batches padded to their longest row."""
    return sum(len(group) * max(case.lengths[i] for i in group) for group in cut)


def _sums_kept(part):
    """A global batch at once runs out of memory behind its first row, whose sums stay when it is tried again."""

    def train(case, cut, *, float_sums=False, hooks=None):
        if len(cut) > 1:
            return part.train(case, cut, float_sums=float_sums, hooks=hooks)
        result = part.train(case, (cut[0][:1], *cut), float_sums=float_sums, hooks=hooks)
        return replace(result, ran=tuple(step[1:] for step in result.ran))

    return Wrapped(part, train=train)


def _module_missed(part):
    """The last module that the configuration names gets no adapter."""

    def train(case, cut, *, float_sums=False, hooks=None):
        result = part.train(case, cut, float_sums=float_sums, hooks=hooks)
        last = sorted(result.before)[-1].partition(".lora_")[0]

        def rest(tensors):
            return {name: t for name, t in tensors.items() if not name.startswith(last)}

        after, gradients = ([rest(step) for step in steps] for steps in (result.after, result.gradients))
        return replace(result, before=rest(result.before), after=after, gradients=gradients)

    return Wrapped(part, train=train)


def _b_not_zero(part):
    """B starts at small random values."""

    def train(case, cut, *, float_sums=False, hooks=None):
        result = part.train(case, cut, float_sums=float_sums, hooks=hooks)
        moved = {n: t + 2.0**-20 if ".lora_B" in n else t for n, t in result.before.items()}
        return replace(result, before=moved)

    return Wrapped(part, train=train)


def _not_bitwise(subject: Subject) -> str:
    return "" if subject.trainer.bitwise_splits else subject.trainer.why_not


def _splits(name: str, sentence: str, wrap: Callable, modelled_on: str = "", group: str = "accumulation") -> Mutant:
    return Mutant(name, sentence, "trainer", "splits", wrap, _not_bitwise, group, modelled_on)


def _updates(name: str, sentence: str, wrap: Callable, modelled_on: str = "") -> Mutant:
    return Mutant(name, sentence, "trainer", "updates", wrap, group="trainer", modelled_on=modelled_on)


def _mean_of_means(loss: torch.Tensor, supervised: int) -> torch.Tensor:
    return loss / max(supervised, 1)


MUTANTS = (
    _splits("mean of means", "losses are means of micro-batches, averaged",
            _hooks(TrainHooks(weigh=_mean_of_means, tokens=lambda n, cut: len(cut))), "huggingface/transformers#34191"),
    _splits("divided by accumulation once more", "the gradient is divided by the number of micro-batches",
            _hooks(TrainHooks(tokens=lambda n, cut: n * len(cut))), "unslothai/unsloth-zoo#1023"),
    _splits("divided twice across processes", "the gradient is divided by two processes again",
            _hooks(TrainHooks(tokens=lambda n, cut: n * 2)), "huggingface/transformers#37474"),
    _splits("padding counted", "the divisor counts padding to the longest row", _counted(_padded)),
    _splits("prompt tokens counted", "the divisor counts the prompt",
            _counted(lambda case, cut: sum(case.lengths))),
    _splits("counted before the shift", "the divisor counts labels that no token predicts",
            _hooks(TrainHooks(tokens=lambda n, cut: n + sum(len(group) for group in cut)))),
    _splits("short last micro-batch as if full", "the last, short micro-batch is divided by a full one's size",
            _hooks(TrainHooks(tokens=lambda n, cut: n * len(cut) * len(cut[0]) / sum(len(group) for group in cut))),
            "modelscope/ms-swift#10084"),
    _splits("last micro-batch dropped", "a short last micro-batch is left out",
            _hooks(TrainHooks(order=lambda cut: cut[:-1] or cut)), "tracel-ai/burn#5695"),
    _splits("sums kept after running out of memory", "a failed attempt's first row is counted twice", _sums_kept,
            group="trainer"),
    _splits("float sums in training", "gradients are summed in floats", _float_sums, group="order"),
    _splits("dropout redrawn a micro-batch", "the dropout seed counts micro-batches",
            _hooks(TrainHooks(seed=lambda seed, i: seed + i)), group="trainer"),
    _splits("dropout ignored", "dropout is always 0",
            _case(lambda case, cut: (replace(case, dropout=0.0), cut)), "paiml/aprender#2170", group="trainer"),
    _splits("cut ignored in training", "one sequence at a time, always",
            _case(lambda case, cut: (case, tuple((i,) for i in sorted(j for g in cut for j in g))))),
    _splits("rate of 0", "the learning rate is 0: every cut gives one digest",
            _case(lambda case, cut: (replace(case, hyper=replace(case.hyper, lr=0.0)), cut)), group="trainer"),
    _splits("one tensor stuck", "one adapter tensor never moves", _one_tensor_stuck, group="injection"),
    _splits("a module missed", "one module that the configuration names gets no adapter", _module_missed,
            "vllm-project/vllm#55193", group="injection"),
    _updates("frozen weight touched", "one frozen element moves by one unit in the last place",
             _hooks(TrainHooks(before_step=_poke_frozen))),
    _updates("A moves at step 1", "A moves by 2^-20 of itself though its gradient is 0",
             _hooks(TrainHooks(before_step=_poke_a))),
    _updates("one tensor not updated", "one adapter tensor is not stepped", _one_tensor_stuck),
    _updates("B does not start at 0", "B starts at small values", _b_not_zero, "hao-ai-lab/FastVideo#781"),
)  # fmt: skip
