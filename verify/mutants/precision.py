"""Faults of precision: narrow accumulators, tf32, roundings that nobody declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, base_alone, in_call, in_result, needs
from verify.oracle.linear import lora_linear_backward, lora_linear_forward, scale_of
from verify.subject import LinearInputs, LinearResult


def _bf16_sums(inputs: LinearInputs, result: LinearResult, divisor: float) -> LinearResult:
    """dA and dB accumulated in bf16, 16 tokens at a time."""
    scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    da, db = torch.zeros_like(result.da).bfloat16(), torch.zeros_like(result.db).bfloat16()
    keep = result.keep
    for start in range(0, inputs.x.shape[0], 16):
        rows = slice(start, start + 16)
        kept = None if keep is None else keep[rows].to(inputs.x.device)
        part = lora_linear_backward(
            inputs.dy[rows], inputs.x[rows], inputs.weight, inputs.a.to(inputs.x.dtype),
            inputs.b.to(inputs.x.dtype), scale, keep=kept, p=inputs.dropout,
        )  # fmt: skip
        da, db = (da + part.da).bfloat16(), (db + part.db).bfloat16()
    return replace(result, da=da.float() / divisor, db=db.float() / divisor)


def _bf16_y(inputs: LinearInputs, result: LinearResult, divisor: float) -> LinearResult:
    """y summed over K in bf16, 16 products at a time."""
    y = torch.zeros_like(result.y).bfloat16()
    for start in range(0, inputs.x.shape[1], 16):
        columns = slice(start, start + 16)
        y = (y + inputs.x[:, columns].double() @ inputs.weight[:, columns].double().T).bfloat16()
    zero = torch.zeros_like(inputs.a)
    lora = result.y.double() - lora_linear_forward(inputs.x, inputs.weight, zero, inputs.b, 1.0)
    return replace(result, y=(y.double() + lora).to(result.y.dtype))


def _tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32's 10 bits (ties away from zero)."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _twice_rounded(inputs: LinearInputs, result: LinearResult, divisor: float) -> LinearResult:
    """The base product is stored in the working dtype before LoRA is added."""
    base = base_alone(inputs)[0]
    lora = _exact_y(inputs, result) - base
    return replace(result, y=(base.to(result.y.dtype).double() + lora).to(result.y.dtype))


def _exact_y(inputs: LinearInputs, result: LinearResult) -> torch.Tensor:
    keep = None if result.keep is None else result.keep.to(inputs.x.device)
    a, b = inputs.a.to(inputs.x.dtype), inputs.b.to(inputs.x.dtype)
    scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    return lora_linear_forward(inputs.x, inputs.weight, a, b, scale, inputs.bias, keep=keep, p=inputs.dropout)


def _truncated(inputs: LinearInputs, result: LinearResult, divisor: float) -> LinearResult:
    """dx is cut to the working dtype instead of rounded to it."""
    if result.dx.dtype == torch.float32:
        return result
    exact = lora_linear_backward(
        inputs.dy, inputs.x, inputs.weight, inputs.a.to(inputs.x.dtype), inputs.b.to(inputs.x.dtype),
        scale_of(inputs.alpha, inputs.rank, inputs.rslora),
        keep=None if result.keep is None else result.keep.to(inputs.x.device), p=inputs.dropout,
    ).dx  # fmt: skip
    rounded = exact.to(result.dx.dtype)
    over = rounded.double().abs() > exact.abs()
    toward_zero = torch.nextafter(rounded, torch.zeros_like(rounded))
    return replace(result, dx=torch.where(over, toward_zero, rounded))


def _fault(name: str, sentence: str, wrap: Callable, modelled_on: str = "", *dtypes: torch.dtype) -> Mutant:
    more = {"unseen_on": needs(*dtypes)} if dtypes else {}
    return Mutant(name, sentence, "linear", "accuracy", wrap, group="precision", modelled_on=modelled_on, **more)


HALF = (torch.bfloat16, torch.float16)
MUTANTS = (
    _fault("token sums in bf16", "dA and dB are accumulated in bf16", in_result(_bf16_sums)),
    _fault("bf16 accumulation over K", "y is accumulated in bf16", in_result(_bf16_y)),
    _fault("tf32 products", "fp32 inputs are rounded to tf32",
           in_call(lambda i: replace(i, x=_tf32(i.x), weight=_tf32(i.weight), dy=_tf32(i.dy))), "", torch.float32),
    _fault("rounded twice", "the base product is stored in 16 bits before LoRA is added", in_result(_twice_rounded),
           "vllm-project/vllm#28972", *HALF),
    _fault("cut instead of rounded", "dx is cut to 16 bits", in_result(_truncated), "", *HALF),
    _fault("A and B in bf16", "fp32 and fp16 layers read bf16 copies of A and B",
           in_call(lambda i: replace(i, a=i.a.bfloat16().float(), b=i.b.bfloat16().float())), "",
           torch.float32, torch.float16),
)  # fmt: skip
