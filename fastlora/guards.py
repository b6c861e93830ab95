"""Silent failures, caught before the first step: each has a name, a sentence and a remedy.

And what finds the place of a NaN after the fact.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastlora import packing, stream
from fastlora.data import IGNORED, Row, RowSet
from fastlora.digest import adapter_tensors
from fastlora.errors import InputError, TrainingError
from fastlora.exact import discard, exact, lora_modules
from fastlora.packing import MicroBatch
from fastlora.setup import Objective
from fastlora.token_rows import TokenRows, largest_token
from fastlora.token_sum import read_stats


class SilentFailure(InputError):
    """A run that would train nothing, or the wrong thing, without an error. ``name`` is the guard's."""

    def __init__(self, name: str, sentence: str, remedy: str) -> None:
        super().__init__(f"{name}: {sentence}. {remedy}.")
        self.name = name


def check_rows(rows: RowSet) -> None:
    """Every row has a supervised token, whose label is the token itself, and answers end somewhere.

    Raises:
        SilentFailure: ``no-supervised-token``, ``labels-shifted-twice`` or ``no-end-token``.
    """
    # Rows of token arrays were made by make_row, which refuses the first and cannot do the second.
    for row in () if isinstance(rows.rows, TokenRows) else rows.rows:
        if not (row.labels[1:] != IGNORED).any():
            raise SilentFailure("no-supervised-token", f"line {row.line} has no supervised token",
                                "Give it a completion, or leave it out")
        _check_labels(row)
    if rows.counts.get("without_end") == rows.counts.get("used", len(rows.rows)):
        raise SilentFailure(
            "no-end-token",
            f"in none of the {len(rows.rows)} rows is an end token supervised: the model would never learn "
            "to stop",
            "Let the chat template write the end token inside the assistant's turn",
        )


def _check_labels(row: Row) -> None:
    kept = row.labels != IGNORED
    if (row.labels[kept] == row.input_ids[kept]).all():
        return
    shifted = kept[:-1] & (row.labels[:-1] == row.input_ids[1:])
    if shifted.sum() == kept[:-1].sum():
        raise SilentFailure(
            "labels-shifted-twice", f"the labels of line {row.line} are those of the next token already, and "
            "the loss shifts them by one", "Give each token's own id as its label"
        )
    raise SilentFailure("labels-not-tokens", f"line {row.line} has labels that are not its tokens",
                        "Give each token's own id as its label, or -100")


def check_batch(batch: MicroBatch) -> None:
    """The labels of a micro-batch are the *next* tokens, once, and there are some.

    Raises:
        SilentFailure: ``no-supervised-token`` or ``labels-shifted-twice``.
    """
    kept = (batch.labels != IGNORED).nonzero()[:, 0]
    if batch.supervised < 1 or not len(kept):
        raise SilentFailure("no-supervised-token", f"a micro-batch (lines {_some(batch.lines)}) has no "
                            "supervised token", "Give its rows completions, or leave them out")
    ids = batch.input_ids[0]
    following = kept + 1
    if int(following.max()) >= len(ids) or not bool((ids[following] == batch.labels[kept]).all()):
        raise SilentFailure("labels-shifted-twice", "the labels of a micro-batch (lines "
                            f"{_some(batch.lines)}) are not the next tokens", "Shift labels once")


def check_tokens(model: nn.Module, *row_lists: Sequence[Row]) -> None:
    """Every token has a row in the model's embedding.

    Raises:
        InputError: names the line and the token; the tokenizer is another model's, or has tokens added.
    """
    size = model.get_input_embeddings().weight.shape[0]
    for rows in row_lists:
        token, place = largest_token(rows)
        if token >= size:
            raise InputError(f"line {rows[place].line}: token {token} is not in the model's embedding (allowed "
                             f"are 0 to {size - 1}); the tokenizer is not this model's")


def vocabulary_note(model: nn.Module, tokenizer, *row_lists: Sequence[Row]) -> str | None:
    """A sentence if the tokenizer knows tokens that the model has no embedding for, all of which :func:`check_tokens` let
    pass because no row holds one; else None."""
    size, known = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if known <= size:
        return None
    most = max(largest_token(rows)[0] for rows in row_lists)
    return (f"tokens: the tokenizer knows {known}, the model {size}; no row holds one of the others (the largest is {most}), "
            "but a prompt might")


def check_causal(model: nn.Module) -> None:
    """No position sees a later one: the gradient of the first position's logits by the later embeddings is 0, exactly.

    An encoder (BERT) loads as a causal language model too, and would learn to copy its input. A model that takes no
    ``inputs_embeds`` cannot be asked.

    Raises:
        InputError: it is not causal, with its class.
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return
    table = model.get_input_embeddings().weight
    ids = torch.arange(8, device=table.device)[None] % table.shape[0]
    inputs = table.detach()[ids].requires_grad_()
    was_training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for parameter in trainable:  # no gradients but the one asked for, and no kernels compiled for them
            parameter.requires_grad_(False)
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, 0].float().sum(), inputs)
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)
    # NaN is no answer; it is found, with its module, when the first loss is looked at.
    if bool((gradient[0, 1:].nan_to_num() != 0).any()):
        raise InputError(f"model: {type(model).__name__} lets a position see later ones, so it is no causal language model; "
                         "allowed is one that predicts the next token")


def adapter_is_finite(model: nn.Module) -> bool:
    """Whether no element of A or B is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in adapter_tensors(model).values())


def check_reached(objective: Objective, rows: Sequence[Row], alignment: int, device: torch.device) -> None:
    """The loss reaches every adapter: A and B are trainable, and dB is not all zero in each (where B is
    still 0, dA is 0 and says nothing).

    Tried on the shortest row, then, for what it did not reach (an expert no token went to), on all ``rows``
    one after the other. Leaves no sums and no gradients behind.

    Raises:
        SilentFailure: ``adapter-not-reached``, naming the modules.
        TrainingError: the loss is not finite; names line and module.
    """
    model = objective.model
    modules = lora_modules(model)
    frozen = [n for n, m in modules if not (m.lora_A.weight.requires_grad and m.lora_B.weight.requires_grad)]
    if frozen:
        raise SilentFailure("adapter-not-reached", f"A or B does not require gradients in {_some(frozen)}",
                            "Call requires_grad_(True) on both")
    missed = [name for name, _ in modules]
    ids = packing.sample_ids(rows)
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        batch = packing.collate([rows[index]], [ids[index]], alignment, device)
        try:
            with stream.use(batch.stream), exact(model):
                loss = objective(batch)
                finite_or_raise(loss.documents, batch.lines, 1, objective, batch)
                if loss.total.requires_grad:
                    loss.backward()
            counts = read_stats([m.sums[1] for _, m in modules])
        finally:
            discard(model)
        reached = {name for (name, _), (_, _, filled, _) in zip(modules, counts) if filled > 0}
        missed = [name for name in missed if name not in reached]
        if not missed:
            return
    raise SilentFailure(
        "adapter-not-reached", f"the loss gives no gradient to {len(missed)} of {len(modules)} adapters "
        f"({_some(missed)})", "Leave them out of target_modules, or look for no_grad, detach or a module "
        "that the model does not call"
    )


def check_update_size(model: nn.Module, learning_rate: float) -> None:
    """Parameters in 16 bits can move at all: Adam's update is about the learning rate, and must reach half
    a unit in the last place of a typical element.

    For your own loop in ``.grad`` mode; the trainer keeps A and B in fp32. Users were bitten: A at its exact
    initial values after 84,000 steps in bf16.

    Args:
        model: its trainable parameters are looked at. learning_rate: the peak of the schedule.

    Raises:
        SilentFailure: ``update-below-rounding``, naming the parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        values = parameter.detach().float().abs().flatten()
        values = values[values > 0]
        if not len(values):
            continue
        typical = float(values.median())
        half = math.ldexp(torch.finfo(parameter.dtype).eps, math.frexp(typical)[1] - 2)
        if learning_rate < half:
            raise SilentFailure(
                "update-below-rounding",
                f"{name} is {parameter.dtype} with elements of about {typical:.2g}, where half a unit in the "
                f"last place is {half:.2g}, and the peak learning rate is {learning_rate:.2g}: most updates "
                "would round to nothing",
                "Keep the parameters in fp32, or raise the learning rate"
            )


class Ran(NamedTuple):
    """A micro-batch whose backward was launched: indices of its rows in the global batch, itself, its documents' losses on the device."""

    cut: list[int]
    batch: MicroBatch
    documents: torch.Tensor


def losses_of(objective: Objective, ran: Sequence[Ran], step: int) -> list[float]:
    """The losses of the rows that ``ran`` holds, in the rows' order. Waits for the device.

    Raises:
        TrainingError: one is not finite; see :func:`finite_or_raise`.
    """
    found: dict[int, float] = {}
    for cut, batch, documents in ran:
        found.update(zip(cut, finite_or_raise(documents, batch.lines, step, objective, batch), strict=True))
    return [found[index] for index in sorted(found)]


def finite_or_raise(documents: torch.Tensor, lines: Sequence[int], step: int, objective: Objective,
                    batch: MicroBatch) -> list[float]:
    """The losses of a micro-batch's documents as floats.

    Raises:
        TrainingError: one is not finite; names step, line and the first module whose output is not finite.
    """
    losses = documents.tolist()
    for line, loss in zip(lines, losses, strict=True):
        if not math.isfinite(loss):
            where = first_not_finite(objective, batch)
            raise TrainingError(f"step {step}: the loss of line {line} is {loss}; {where}")
    return losses


@torch.no_grad()
def first_not_finite(objective: Objective, batch: MicroBatch) -> str:
    """Where NaN or infinity comes from, in words: a parameter that holds it, else the first module to put
    it out."""
    model = objective.model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"module {name.rpartition('.')[0] or name}: its {name.rpartition('.')[2]} is not finite"
    found: list[str] = []

    def look(name: str):
        def hook(_module, _inputs, output) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                found.append(name)
        return hook

    # Leaves only: a block's output is not finite because one inside it was.
    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules()
             if n and (not any(m.children()) or hasattr(m, "lora_A"))]
    try:
        with stream.use(batch.stream):
            objective(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return f"module {found[0]}: the first whose output is not finite" if found else "module lm_head"


def blame_gradient(objective: Objective, rows: Sequence[Row], alignment: int, device: torch.device,
                   seed: int, step: int) -> str | None:
    """The first row of a global batch whose own gradient is not finite, as "line N: module M", or None."""
    model = objective.model
    modules = lora_modules(model)
    ids = packing.sample_ids(rows)
    for index, row in enumerate(rows):
        batch = packing.collate([row], [ids[index]], alignment, device, seed, step)
        try:
            with stream.use(batch.stream), exact(model):
                objective(batch).backward()
            # Backward runs from the end: the last module of the model to be hit is where it began.
            for name, module in reversed(modules):
                for sums in module.sums:
                    try:
                        sums.check(name)
                    except TrainingError as error:
                        return f"line {row.line}: {error}"
        finally:
            discard(model)
    return None


def _some(names: Sequence, most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
