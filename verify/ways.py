"""The wrong ways in which real trainers divided their gradients, told apart by name.

With g_i the gradient of the sum of losses of sequence i, n_i its supervised tokens and N their sum, the gradient of the
mean over supervised tokens is G = sum g_i / N. Each wrong way below gives another combination of the same g_i, so
whoever knows them can say which one a trainer's gradient is. They come from a plain model (transformers, a LoRA product at
every linear, autograd, nothing of the subject), one sequence at a time, with the A that the subject drew.

How far a right gradient may be from G: the smallest thing there is to miscount is one token, which moves it by
1 / (N + 1); half of that parts right from wrong. Reports of such ways: huggingface/transformers#34191,
huggingface/trl#2175 (mean of means), huggingface/transformers#37474 (twice across processes), modelscope/ms-swift#10084
(short last micro-batch), unslothai/unsloth-zoo#1023 (by accumulation once more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from verify.subject import Cut, TrainCase
from verify.tiny import END, supervised, tiny_llama, token_rows

RIGHT = "the mean over supervised tokens"
WORLDS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Sequences:
    """Gradients of all trained tensors, flat: ``own`` [sequences, elements] of the supervised tokens' losses,
    ``whole`` of every token's; ``supervised``, ``predicted`` (every token but the first) and ``labelled`` (counted
    before the shift) tokens of each; ``padded`` gives those of a micro-batch.
    """

    own: torch.Tensor
    whole: torch.Tensor
    supervised: torch.Tensor
    predicted: torch.Tensor
    labelled: torch.Tensor
    lengths: tuple[int, ...]
    alignment: int

    def padded(self, group: tuple[int, ...]) -> tuple[float, ...]:
        """Tokens of a micro-batch with its padding: to its longest row, with and without the shift, and packed."""
        longest = max(self.lengths[i] for i in group)
        packed = sum(-(-self.lengths[i] // self.alignment) * self.alignment for i in group)
        return float(longest * len(group)), float((longest - 1) * len(group)), float(packed)


def sequences(case: TrainCase, before: dict[str, torch.Tensor], alignment: int) -> Sequences:
    """The gradients of the first step, sequence by sequence.

    Args:
        before: the subject's tensors by name; each name ends in ``<module path>.lora_A...`` or ``.lora_B...``.
    """
    model, tensors = tiny_llama(case).double(), {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, start in before.items():
        tensors[name] = start.detach().double().clone().requires_grad_()
    _attach(model, tensors)
    own, whole = [], []
    for index, ids in enumerate(token_rows(case, 0)):
        row = torch.tensor([[*ids, END]])
        losses = functional.cross_entropy(model(input_ids=row).logits[0, :-1].double(), row[0, 1:], reduction="none")
        counted = losses[max(case.prompt, 1) - 1 :] if index not in case.masked else losses[:0]
        for total, found in ((counted.sum(), own), (losses.sum(), whole)):
            gradients = torch.autograd.grad(total, list(tensors.values()), retain_graph=True)
            found.append(torch.cat([g.flatten() for g in gradients]))
    count = range(len(case.lengths))
    labelled = [0 if i in case.masked else case.lengths[i] + 1 - case.prompt for i in count]
    return Sequences(
        torch.stack(own),
        torch.stack(whole),
        torch.tensor([float(supervised(case, i)) for i in count], dtype=torch.float64),
        torch.tensor([float(n) for n in case.lengths], dtype=torch.float64),
        torch.tensor([float(n) for n in labelled], dtype=torch.float64),
        tuple(n + 1 for n in case.lengths),
        alignment,
    )


def _attach(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """y + (x A^T) B^T at every linear that has an A and a B."""
    for path, module in model.named_modules():
        found = {
            kind: tensor
            for name, tensor in tensors.items()
            for kind in ("lora_A", "lora_B")
            if f".{name}".partition(f".{kind}")[0].endswith(f".{path}") and f".{kind}" in name
        }
        if isinstance(module, torch.nn.Linear) and len(found) == 2:
            module.register_forward_hook(
                lambda _, args, y, found=found: y + (args[0] @ found["lora_A"].T) @ found["lora_B"].T
            )


def ways(s: Sequences, cut: Cut) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, gradient) of the right way and of every wrong one, for one cut; one name may have several forms."""
    n, total = s.supervised, s.supervised.sum()
    parts, first = len(cut), len(cut[0])

    def of(group: tuple[int, ...], kind: torch.Tensor = s.own) -> torch.Tensor:
        return kind[list(group)].sum(0)

    def mean(divisor: Callable[[tuple[int, ...]], float], kind: torch.Tensor = s.own) -> torch.Tensor:
        """The mean over micro-batches of each one's sum by its divisor; empty ones count in the number alone."""
        shares = [of(group, kind) / by for group in cut if (by := float(divisor(group))) > 0]
        return sum(shares, start=torch.zeros_like(kind[0])) / parts

    everything = s.own.sum(0)
    yield RIGHT, everything / total
    yield "mean of means: every micro-batch weighs the same", mean(lambda g: n[list(g)].sum())
    each = s.own[n > 0] / n[n > 0, None]
    yield "mean of means: every sequence weighs the same", each.sum(0) / len(n)
    yield "mean of means: every sequence weighs the same", each.mean(0)
    for form in range(3):
        name = "padding counted: the divisor holds padding tokens"
        yield name, everything / sum(s.padded(g)[form] for g in cut)
        yield name, mean(lambda g, form=form: s.padded(g)[form])
    if parts > 1:
        kept = [i for group in cut[:-1] for i in group]
        name = "short last micro-batch: "
        yield name + "left out", of(tuple(kept)) / total
        yield name + "left out", of(tuple(kept)) / n[kept].sum().clamp(min=1)
    if parts > 1 and len(cut[-1]) < first:
        yield "short last micro-batch: divided as if it were full", everything / total * len(n) / (parts * first)
        yield (
            "short last micro-batch: divided as if it were full",
            sum((s.own[i] / n[i] for group in cut for i in group if n[i] > 0), start=torch.zeros_like(everything))
            / (parts * first),
        )
    prompt = "prompt tokens counted: "
    yield prompt + "in the divisor", everything / s.predicted.sum()
    yield prompt + "in loss and divisor", s.whole.sum(0) / s.predicted.sum()
    yield prompt + "in the loss alone", s.whole.sum(0) / total
    yield prompt + "in the divisor", mean(lambda g: s.predicted[list(g)].sum())
    shift = "counted before the shift: labels that nothing predicts are in the divisor"
    yield shift, everything / s.labelled.sum()
    yield shift, everything / (total + len(n))
    yield "divided by accumulation once more", everything / total / parts
    for world in WORLDS:
        yield f"divided twice across processes: by {world} of them again", everything / total / world
    yield "not divided: the gradient of the sum", everything


@dataclass(frozen=True)
class Named:
    """``way``: what fits best over all probes; ``distance``: how far off it is, relative; ``right``: how far G is;
    ``allowed``: half of what one miscounted token does."""

    way: str
    distance: float
    right: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """Whether the gradients are those of the mean over supervised tokens."""
        return self.right <= self.allowed

    def sentence(self) -> str:
        """What the gradients are."""
        off = f"{self.right:.3g} off the mean over supervised tokens (one miscounted token: {2 * self.allowed:.2g})"
        if self.way == RIGHT or self.distance > self.allowed:
            return (
                f"gradients are {off}; no known way gives them, the nearest is '{self.way}' ({self.distance:.2g} off)"
            )
        return f"{self.way} ({off}; {self.distance:.2g} off this way)"


def name_of(probes: list[tuple[Sequences, Cut, torch.Tensor]]) -> Named:
    """Which way gives the gradients of several batches and cuts, each a flat tensor in the order of its sequences'."""
    distances: list[dict[str, float]] = []
    for found, cut, gradient in probes:
        size = (found.own.sum(0) / found.supervised.sum()).norm()
        nearest: dict[str, float] = {}
        for name, expected in ways(found, cut):
            nearest[name] = min(nearest.get(name, float("inf")), float((gradient - expected).norm() / size))
        distances.append(nearest)
    # A way that a cut does not have (a short last micro-batch, of one) is the right one there.
    names = dict.fromkeys(name for nearest in distances for name in nearest)
    worst = {name: max(nearest.get(name, nearest[RIGHT]) for nearest in distances) for name in names}
    best = min(worst, key=lambda name: (worst[name], name != RIGHT))
    # tolerance-rule: half of the least that one miscounted token does, 1 / (N + 1), in the largest batch.
    allowed = 0.5 / (max(float(found.supervised.sum()) for found, _, _ in probes) + 1)
    return Named(best, worst[best], worst[RIGHT], allowed)
