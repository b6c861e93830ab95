"""fastlora as a subject, through the entry points its users have; only files named ``subjects`` import it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

import fastlora
from fastlora import stream
from fastlora.errors import InputError, TrainingError
from fastlora.exact import TokenSum, discard
from fastlora.ops import backend
from fastlora.ops.dropout import module_key
from verify.bounds import Accumulator
from verify.graphs import FixedPoint, Roundings
from verify.oracle.adamw import Hyper
from verify.oracle.linear import scale_of
from verify.oracle.philox import keep_mask
from verify.subject import (
    EXACT,
    GRAD,
    Documents,
    LinearInputs,
    LinearResult,
    Refused,
    SplitResult,
    Subject,
)
from verify.subjects_files import FastloraFiles
from verify.subjects_refusals import refusals
from verify.subjects_rows import FastloraOperations
from verify.subjects_trainer import FastloraTrainer, adamw

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
        # The interpreter runs a program at a time: this many products take it a third of a second.
        self.most_products = 2**17 if forced else math.inf

    def roundings(self, dtype: torch.dtype, mode: str) -> Roundings:
        """S and dS rounded once; y and dx rounded once from an fp32 accumulator; integer sums if
        exact."""
        tensor_cores = self.device == "cuda" and dtype in HALF
        # the kernels' chunks: up to 512 tokens of a document, which is padded to 64
        kernels = self.forced == "triton" or (self.forced is None and self.device == "cuda")
        chunks = FixedPoint(longest=512, shortest=64) if kernels else FixedPoint()
        return Roundings.fused(
            dtype,
            accumulator=Accumulator(torch.float32, truncating=tensor_cores),
            fixed_point=chunks if mode == EXACT else None,
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

    def operators(self, inputs: LinearInputs) -> Iterator[tuple]:
        """The registered forward and backward with the arguments of one call, with this backend in use meanwhile."""
        x, weight = inputs.x.detach().clone().requires_grad_(), inputs.weight
        a, b = (t.detach().clone().requires_grad_() for t in (inputs.a, inputs.b))
        tokens = inputs.tokens if inputs.dropout else None
        rest = inputs.dropout, inputs.seed if inputs.dropout else 0, tokens
        scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
        with self._backend():
            with torch.no_grad():
                _, s = torch.ops.fastlora.lora_linear(x, weight, a, b, scale, inputs.bias, *rest)
            plain = [t.detach() for t in (inputs.dy, x, weight, a, b, s)]
            yield torch.ops.fastlora.lora_linear.default, (x, weight, a, b, scale, inputs.bias, *rest)
            yield torch.ops.fastlora.lora_linear_backward.default, (*plain, scale, *rest, True)

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
        return self.world([parts], mode)

    def world(self, ranks: list[list[Documents]], mode: str) -> SplitResult:
        """:meth:`accumulate` on each process by itself, then what an all-reduce of the sums does."""
        first = next(part for parts in ranks for part in parts)
        rows, ran = {}, []
        sums: list[torch.Tensor | TokenSum] = []
        for parts in ranks:
            net, layer = _injected(first.weight, None, first.a, first.b, first.alpha, False, first.dropout)
            layer.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[0]))
            around = fastlora.exact(net) if mode == EXACT else contextlib.nullcontext()
            with self._backend(), around:
                for part in parts:
                    rows.update(self._one_part(layer, part))
            if mode == GRAD:
                own = [layer.lora_A.weight.grad, layer.lora_B.weight.grad]
                sums = own if not sums else [total + g for total, g in zip(sums, own)]
                continue
            _checked(layer)
            own = [TokenSum(total.total.shape, self.device).merge_(total) for total in layer.sums]
            sums = own if not sums else [total.merge_(other) for total, other in zip(sums, own)]
            discard(net)
        da, db = sums if mode == GRAD else [total.gradient(1.0) for total in sums]
        return SplitResult(da, db, rows, tuple(ran))

    def _one_part(self, layer: nn.Module, part: Documents) -> dict:
        lengths = tuple(len(x) for x in part.x)
        if not any(lengths):
            # An empty micro-batch: no stream has no documents.
            x = part.x[0].detach().requires_grad_()
            y = layer(x)
            y.backward(part.dy[0])
            return {part.ids[0]: (y.detach(), x.grad)}
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


def _checked(layer: nn.Module) -> None:
    for name, total in zip(("lora_A", "lora_B"), layer.sums):
        try:
            total.check(name)
        except TrainingError as error:
            raise Refused(str(error)) from error


def _exact_gradients(layer: nn.Module, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    _checked(layer)
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
        optimizer = adamw(net, hyper)
        after = []
        for step in gradients:
            for name in ("lora_A", "lora_B"):
                getattr(layer, name).weight.grad = step[name].to(self.device)
            optimizer.step()
            after.append(
                {n: getattr(layer, n).weight.detach().cpu().clone() for n in ("lora_A", "lora_B")}
            )
        return after


def built_in(device: str) -> list[Subject]:
    """The subjects of this machine for "auto", "cpu" or "cuda"; empty if a device asked for is not
    there.

    In Triton's interpreter (``TRITON_INTERPRET=1`` from the start) the kernels are a CPU subject of
    their own, in fp32 and fp16: the interpreter's bf16 is wrong.
    """
    half, fp32 = (torch.bfloat16, torch.float16), torch.float32
    subjects = []

    def add(name: str, where: str, tag: str) -> None:
        # what people train in comes first: a short budget ends before the last
        dtypes = (*half, fp32) if where == "cuda" else (fp32, *half)
        linear, rows = (kind(where, dtypes) for kind in (FastloraLinear, FastloraOperations))
        parts = linear, FastloraAdamW(where), FastloraTrainer(where)
        listed, refused = functools.partial(refusals, where), (InputError, TrainingError)
        subjects.append(Subject(name, where, *parts, (tag,), rows, FastloraFiles(), listed, refused))

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
