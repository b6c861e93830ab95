"""fastlora's training loop as a subject: its own pieces under the harness's cuts, and whole runs from files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import torch
from rich.console import Console
from torch import nn

import fastlora
from fastlora import blocks, packing, stream
from fastlora.data import IGNORED, make_row
from fastlora.exact import TokenSum, lora_modules, zero_all
from fastlora.families import head_of
from fastlora.invariant import make_invariant
from fastlora.ops.linear_cross_entropy import linear_cross_entropy
from verify.oracle.adamw import Hyper
from verify.oracle.digest import md5_of_tensors
from verify.strategies_adapter import MODULES
from verify.subject import Cut, TrainCase, TrainHooks, TrainResult, WholeRun
from verify.tiny import END, supervised_tokens, tiny_llama, token_rows, tokenizer, write_rows


def adamw(model: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    """The library's optimiser with the harness's hyper-parameters."""
    return fastlora.AdamW(model, **dataclasses.asdict(hyper))


class FastloraTrainer:
    """The training loop's own pieces on a tiny random Llama: packing, streams, exact sums, AdamW."""

    supports_hooks = True
    worlds = (1, 2, 3)
    heads = True

    def __init__(self, device: str) -> None:
        self.device = device
        self.alignment = stream.alignment_for(device)
        self.bitwise_splits, self.why_not = True, ""

    def train(
        self,
        case: TrainCase,
        cut: Cut,
        *,
        float_sums: bool = False,
        hooks: TrainHooks | None = None,
    ) -> TrainResult:
        """Train ``case.steps`` steps with each global batch cut into ``cut``."""
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        around = blocks.single_thread() if self.device == "cpu" else contextlib.nullcontext()
        try:
            with around:
                return self._train(case, cut, float_sums, hooks or TrainHooks())
        finally:
            torch.set_num_threads(threads)

    def _train(self, case: TrainCase, cut: Cut, float_sums: bool, hooks: TrainHooks) -> TrainResult:
        model = tiny_llama(case).to(self.device)
        # An adapter on the head refuses a loss that was weighed behind its back, before any claim could tell.
        case = dataclasses.replace(case, head=case.head and hooks.weigh is None)
        fastlora.inject(model, _lora(case), seed=case.seed)
        invariant = make_invariant(model)
        model.train()
        ran: list[int] = []
        head = head_of(model)
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        optimizer, frozen_before = adamw(model, case.hyper), md5_of_tensors(frozen)
        before, after, gradients, steps = _copy(trained), [], [], []
        for step in range(case.steps):
            rows = _rows(case, step)
            ids, ran_before = packing.sample_ids(rows), len(ran)
            self._backward(model, head, rows, ids, case, step, cut, float_sums, hooks)
            tokens = supervised_tokens(case)
            told = tokens if hooks.tokens is None else hooks.tokens(tokens, cut)
            gradients.append(_gradients(model, told, float_sums))
            if hooks.before_step is not None:
                hooks.before_step(model)
            optimizer.step(supervised_tokens=told)
            optimizer.zero_grad()
            steps.append(tuple(ran[ran_before:]))
            after.append(_copy(trained))
        result = TrainResult(before, after, gradients, tuple(steps), (frozen_before, md5_of_tensors(frozen)))
        invariant.undo()
        return result

    def run(self, case: TrainCase, most_tokens: int, order: tuple[int, ...]) -> WholeRun:
        """``fastlora.Trainer`` on files, dropout as the case says, with ``most_tokens`` a
        micro-batch."""
        model = tiny_llama(case).to(self.device)
        lora = _lora(case)
        with tempfile.TemporaryDirectory() as folder:
            data, output = pathlib.Path(folder, "rows.jsonl"), pathlib.Path(folder, "out")
            write_rows(data, case, order)
            config = fastlora.TrainConfig(
                data=str(data),
                output=str(output),
                batch_size=len(case.lengths),
                micro_batch_tokens=most_tokens,
                steps=case.steps,
                learning_rate=case.hyper.lr,
                lr_scheduler="constant",
                warmup_ratio=0.0,
                max_grad_norm=None,
                seed=case.seed,
                shuffle=False,
                device=self.device,
                dtype="float32",
            )
            trainer = fastlora.Trainer(model, tokenizer(), config, lora, console=Console(quiet=True))
            before = _copy({n: p for n, p in model.named_parameters() if p.requires_grad})
            trainer.train()
            lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
        after = _copy({n: p for n, p in model.named_parameters() if p.requires_grad})
        log = [json.loads(line) for line in lines]
        ran = tuple(tuple(m["padded_tokens"] for m in line["micro_batches"]) for line in log)
        return WholeRun(before, after, ran, log[0]["grad_norm"])

    def _backward(self, model, head, rows, ids, case, step, cut, float_sums, hooks) -> None:
        """All micro-batches of one global batch, one process after the other, each with sums of its own."""
        order = cut if hooks.order is None else hooks.order(cut)
        with contextlib.nullcontext() if float_sums else fastlora.exact(model):
            sums = [] if float_sums else [total for _, module in lora_modules(model) for total in module.sums]
            reduced = [TokenSum(total.total.shape, self.device) for total in sums]
            for rank in range(case.world):
                for i in range(rank, len(order), case.world):
                    self._micro_batch(model, head, rows, ids, case, step, i, order[i], hooks)
                # What an all-reduce does; a process that had nothing to do gives zeros.
                for total, other in zip(reduced, sums):
                    total.merge_(other)
                zero_all(sums)
            for total, other in zip(sums, reduced):
                total.merge_(other)

    def _micro_batch(self, model, head, rows, ids, case, step, i, part, hooks) -> None:
        seed = case.seed if hooks.seed is None else hooks.seed(case.seed, i)
        chosen, names = [rows[j] for j in part], [ids[j] for j in part]
        batch = packing.collate(chosen, names, self.alignment, self.device, seed=seed, step=step)
        with stream.use(batch.stream):
            hidden = head.decoder(batch.input_ids, batch.position_ids)
            loss, supervised = linear_cross_entropy(
                hidden[0], head.weight, batch.labels, softcap=head.softcap, logit_scale=head.logit_scale,
                lora=None if head.lora is None else head.lora.in_loss(hidden[0]),
            )  # fmt: skip
            (loss if hooks.weigh is None else hooks.weigh(loss, int(supervised))).backward()
        if hooks.after_backward is not None:
            hooks.after_backward(model, i)


def _lora(case: TrainCase) -> fastlora.LoraConfig:
    targets = {"target_modules": [*MODULES, "lm_head"]} if case.head else {}
    return fastlora.LoraConfig(r=case.rank, lora_dropout=case.dropout, **targets)


def _rows(case: TrainCase, step: int) -> list:
    """The step's rows with their end token, built without text; the prompt is not supervised, nor is a masked row
    (which the library's reader would refuse)."""
    rows = []
    for index, ids in enumerate(token_rows(case, step)):
        row = make_row([*ids, END], [i >= case.prompt for i in range(len(ids) + 1)], index + 1, "text")
        masked = index in case.masked
        rows.append(dataclasses.replace(row, labels=np.full_like(row.labels, IGNORED)) if masked else row)
    return rows


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}


def _gradients(model: nn.Module, tokens: float, float_sums: bool) -> dict[str, torch.Tensor]:
    """The gradient of the mean, as the optimiser will see it."""
    found = {}
    if float_sums:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[name] = (parameter.grad.double() / tokens).float().cpu()
        return found
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and getattr(module, "sums", None) is not None:
            for factor, total in zip(("lora_A", "lora_B"), module.sums):
                found[f"{name}.{factor}.weight"] = total.gradient(tokens).cpu()
    return found
