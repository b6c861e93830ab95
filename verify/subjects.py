"""fastlora as a subject, through the entry points its users have; only files named ``subjects`` import it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections import OrderedDict

import torch
from rich.console import Console
from torch import nn

import fastlora
from fastlora import blocks, packing, stream
from fastlora.data import make_row
from fastlora.errors import InputError, TrainingError
from fastlora.exact import discard
from fastlora.families import head_of
from fastlora.invariant import make_invariant
from fastlora.ops import backend
from fastlora.ops.dropout import module_key
from fastlora.ops.linear_cross_entropy import linear_cross_entropy
from verify.bounds import Accumulator
from verify.graphs import FixedPoint, Roundings
from verify.oracle.adamw import Hyper
from verify.oracle.digest import md5_of_tensors
from verify.oracle.linear import scale_of
from verify.oracle.philox import keep_mask
from verify.subject import (
    EXACT,
    GRAD,
    Cut,
    Documents,
    LinearInputs,
    LinearResult,
    Refused,
    SplitResult,
    Subject,
    TrainCase,
    TrainHooks,
    TrainResult,
    WholeRun,
)
from verify.subjects_refusals import refusals
from verify.subjects_rows import FastloraOperations
from verify.tiny import END, supervised_tokens, tiny_llama, token_rows, tokenizer, write_rows

SEED = 7  # of the streams that name dropout masks
HALF = (torch.bfloat16, torch.float16)


def _injected(weight, bias, a, b, alpha, rslora=False, dropout=0.0) -> tuple[nn.Module, nn.Module]:
    """A model of one LoRA linear with A and B as given, and that linear."""
    outer, inner = weight.shape
    base = nn.Linear(inner, outer, bias=bias is not None, device="meta")
    base.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias.detach(), requires_grad=False)
    net = nn.Sequential(OrderedDict(proj=base))
    config = fastlora.LoraConfig(
        r=a.shape[0],
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=["proj"],
    )
    fastlora.inject(net, config, seed=0)
    with torch.no_grad():
        net.proj.lora_A.weight.copy_(a)
        net.proj.lora_B.weight.copy_(b)
    return net, net.proj


class FastloraLinear:
    """``fastlora.lora_linear`` (mode "grad") and an injected layer under ``fastlora.exact``."""

    modes = (GRAD, EXACT)
    bitwise_splits = True

    def __init__(
        self, device: str, dtypes: tuple[torch.dtype, ...], forced: str | None = None
    ) -> None:
        self.device, self.dtypes, self.forced = device, dtypes, forced
        # What the kernels need of documents they need in the interpreter too.
        self.alignment = stream.alignment_for("cuda" if forced == "triton" else device)
        # On a GPU a new shape compiles six kernels, some seconds of work.
        self.cases_a_shape = 8 if device == "cuda" else 1

    def roundings(self, dtype: torch.dtype, mode: str) -> Roundings:
        """S and dS rounded once; y and dx rounded once from an fp32 accumulator; integer sums if
        exact."""
        tensor_cores = self.device == "cuda" and dtype in HALF
        return Roundings.fused(
            dtype,
            accumulator=Accumulator(torch.float32, truncating=tensor_cores),
            fixed_point=FixedPoint() if mode == EXACT else None,
        )

    def _backend(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.forced is None else backend.use(self.forced)

    def run(self, inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        """Forward and backward of one call."""
        with self._backend():
            return self._exact(inputs, divisor) if mode == EXACT else self._grad(inputs)

    def _grad(self, inputs: LinearInputs) -> LinearResult:
        x = inputs.x.detach().requires_grad_()
        a, b = (t.detach().clone().requires_grad_() for t in (inputs.a, inputs.b))
        key = keep = None
        if inputs.dropout:
            key = fastlora.DropoutKey(inputs.seed, inputs.tokens)
            keep = keep_mask(inputs.seed, inputs.tokens, x.shape[1], inputs.dropout)
        scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        y = fastlora.lora_linear(
            x, inputs.weight, a, b, scale, inputs.bias, dropout=inputs.dropout, key=key
        )
        dx, da, db = torch.autograd.grad(y, (x, a, b), inputs.dy)
        return LinearResult(y.detach(), dx, da, db, keep)

    def _exact(self, inputs: LinearInputs, divisor: float) -> LinearResult:
        net, layer = _injected(
            inputs.weight,
            inputs.bias,
            inputs.a,
            inputs.b,
            inputs.alpha,
            inputs.rslora,
            inputs.dropout,
        )
        rows, x, keep = inputs.x.shape[0], inputs.x.detach().requires_grad_(), None
        around = contextlib.nullcontext()
        if rows and inputs.dropout:
            whole = stream.Stream((rows,), 1, (inputs.seed,), SEED, 0)
            around, seed = stream.use(whole), module_key(SEED, 0, layer.path)
            keep = keep_mask(seed, whole.token_keys(), x.shape[1], inputs.dropout)
        with around, fastlora.exact(net):
            y = layer(x)
            (dx,) = torch.autograd.grad(y, (x,), inputs.dy)
        try:
            da, db = _exact_gradients(layer, divisor)
        finally:
            discard(net)
        return LinearResult(y.detach(), dx, da, db, keep)

    def accumulate(self, parts: list[Documents], mode: str) -> SplitResult:
        """Gradients over micro-batches of packed documents; padding rows hold ones, their dy zeros."""
        first = parts[0]
        net, layer = _injected(
            first.weight, None, first.a, first.b, first.alpha, False, first.dropout
        )
        rows, ran = {}, []
        layer.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[0]))
        around = fastlora.exact(net) if mode == EXACT else contextlib.nullcontext()
        with self._backend(), around:
            for part in parts:
                rows.update(self._one_part(layer, part))
        if mode == GRAD:
            return SplitResult(layer.lora_A.weight.grad, layer.lora_B.weight.grad, rows, tuple(ran))
        da, db = _exact_gradients(layer, 1.0)
        discard(net)
        return SplitResult(da, db, rows, tuple(ran))

    def _one_part(self, layer: nn.Module, part: Documents) -> dict:
        lengths = tuple(len(x) for x in part.x)
        packed = stream.Stream(lengths, self.alignment, part.ids, SEED, 0)
        x = torch.ones(packed.total, part.x[0].shape[1], dtype=part.x[0].dtype, device=self.device)
        dy = torch.zeros(packed.total, part.dy[0].shape[1], dtype=x.dtype, device=self.device)
        for (start, _), length, xs, dys in zip(packed.spans, lengths, part.x, part.dy):
            x[start : start + length], dy[start : start + length] = xs, dys
        x.requires_grad_()
        with stream.use(packed):
            y = layer(x)
            y.backward(dy)
        return {
            name: (y.detach()[start : start + length], x.grad[start : start + length])
            for name, (start, _), length in zip(part.ids, packed.spans, lengths)
        }


def _exact_gradients(layer: nn.Module, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    for name, total in zip(("lora_A", "lora_B"), layer.sums):
        try:
            total.check(name)
        except TrainingError as error:
            raise Refused(str(error)) from error
    da, db = (total.gradient(divisor) for total in layer.sums)
    return da, db


class FastloraAdamW:
    """``fastlora.AdamW`` on ``.grad``."""

    arithmetic = torch.float64
    clip_epsilon = 0.0

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, parameters, gradients, hyper: Hyper) -> list[dict[str, torch.Tensor]]:
        """Parameters after each step; names are "lora_A" [r, K] and "lora_B" [N, r]."""
        a, b = (parameters[name].to(self.device) for name in ("lora_A", "lora_B"))
        net, layer = _injected(
            torch.zeros(b.shape[0], a.shape[1], device=self.device), None, a, b, 1.0
        )
        optimizer = _optimizer(net, hyper)
        after = []
        for step in gradients:
            for name in ("lora_A", "lora_B"):
                getattr(layer, name).weight.grad = step[name].to(self.device)
            optimizer.step()
            after.append(
                {n: getattr(layer, n).weight.detach().cpu().clone() for n in ("lora_A", "lora_B")}
            )
        return after


def _optimizer(model: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    return fastlora.AdamW(model, **dataclasses.asdict(hyper))


class FastloraTrainer:
    """The training loop's own pieces on a tiny random Llama: packing, streams, exact sums, AdamW."""

    supports_hooks = True

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
        config = fastlora.LoraConfig(r=case.rank, lora_dropout=case.dropout)
        fastlora.inject(model, config, seed=case.seed)
        invariant = make_invariant(model)
        model.train()
        ran: list[int] = []
        head = head_of(model)
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        optimizer, frozen_before = _optimizer(model, case.hyper), md5_of_tensors(frozen)
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
        result = TrainResult(
            before, after, gradients, tuple(steps), (frozen_before, md5_of_tensors(frozen))
        )
        invariant.undo()
        return result

    def run(self, case: TrainCase, most_tokens: int, order: tuple[int, ...]) -> WholeRun:
        """``fastlora.Trainer`` on files, dropout as the case says, with ``most_tokens`` a
        micro-batch."""
        model = tiny_llama(case).to(self.device)
        lora = fastlora.LoraConfig(r=case.rank, lora_dropout=case.dropout)
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
            trainer = fastlora.Trainer(
                model, tokenizer(), config, lora, console=Console(quiet=True)
            )
            before = _copy({n: p for n, p in model.named_parameters() if p.requires_grad})
            trainer.train()
            lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
        after = _copy({n: p for n, p in model.named_parameters() if p.requires_grad})
        log = [json.loads(line) for line in lines]
        ran = tuple(tuple(m["padded_tokens"] for m in line["micro_batches"]) for line in log)
        return WholeRun(before, after, ran, log[0]["grad_norm"])

    def _backward(self, model, head, rows, ids, case, step, cut, float_sums, hooks) -> None:
        """All micro-batches of one global batch."""
        order = cut if hooks.order is None else hooks.order(cut)
        with contextlib.nullcontext() if float_sums else fastlora.exact(model):
            for i, part in enumerate(order):
                seed = case.seed if hooks.seed is None else hooks.seed(case.seed, i)
                batch = packing.collate(
                    [rows[j] for j in part],
                    [ids[j] for j in part],
                    self.alignment,
                    self.device,
                    seed=seed,
                    step=step,
                )
                with stream.use(batch.stream):
                    hidden = head.decoder(batch.input_ids, batch.position_ids)
                    loss, supervised = linear_cross_entropy(
                        hidden[0],
                        head.weight,
                        batch.labels,
                        softcap=head.softcap,
                        logit_scale=head.logit_scale,
                    )
                    (loss if hooks.weigh is None else hooks.weigh(loss, int(supervised))).backward()
                if hooks.after_backward is not None:
                    hooks.after_backward(model, i)


def _rows(case: TrainCase, step: int) -> list:
    """The step's rows with their end token, built without text; the prompt is not supervised."""
    return [
        make_row([*ids, END], [i >= case.prompt for i in range(len(ids) + 1)], line, "text")
        for line, ids in enumerate(token_rows(case, step), 1)
    ]


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


def built_in(device: str) -> list[Subject]:
    """The subjects of this machine for "auto", "cpu" or "cuda"; empty if a device asked for is not
    there.

    In Triton's interpreter (``TRITON_INTERPRET=1`` from the start) the kernels are a CPU subject of
    their own, in fp32 and fp16: the interpreter's bf16 is wrong.
    """
    half, fp32 = (torch.bfloat16, torch.float16), torch.float32
    subjects = []

    def add(name: str, where: str, tag: str) -> None:
        linear, rows = (kind(where, (fp32, *half)) for kind in (FastloraLinear, FastloraOperations))
        parts = linear, FastloraAdamW(where), FastloraTrainer(where)
        listed, refused = functools.partial(refusals, where), (InputError, TrainingError)
        subjects.append(Subject(name, where, *parts, (tag,), rows, None, listed, refused))

    if device in ("auto", "cpu"):
        add("fastlora reference", "cpu", "reference")
        if os.environ.get("TRITON_INTERPRET") == "1" and backend.triton_installed():
            kinds = FastloraLinear, FastloraOperations
            linear, rows = (kind("cpu", (fp32, torch.float16), forced="triton") for kind in kinds)
            tags = ("interpreter",)
            subjects.append(Subject("fastlora interpreter", "cpu", linear, tags=tags, operations=rows))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        add("fastlora triton", "cuda", "triton")
    return subjects
