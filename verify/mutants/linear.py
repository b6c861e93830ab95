"""Faults of the LoRA linear: maths, indexing, precision, order. Most change the call or its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.oracle.linear import lora_linear_backward, lora_linear_forward, scale_of
from verify.subject import GRAD, LinearInputs, LinearResult

Change = Callable[[LinearInputs, LinearResult, float], LinearResult]


def _result(change: Change) -> Callable:
    """A fault that alters the result; ``change(inputs, result, divisor)``."""

    def wrap(part):
        def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
            return change(inputs, part.run(inputs, mode, divisor), divisor)

        return Wrapped(part, run=run)

    return wrap


def _call(change: Callable[[LinearInputs], LinearInputs]) -> Callable:
    """A fault that alters the call."""

    def wrap(part):
        def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
            return part.run(change(inputs), mode, divisor)

        return Wrapped(part, run=run)

    return wrap


def _without_lora(inputs: LinearInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dx of the base alone, correctly rounded."""
    zero_b = torch.zeros_like(inputs.b)
    y = lora_linear_forward(inputs.x, inputs.weight, inputs.a, zero_b, 1.0, inputs.bias)
    dx = lora_linear_backward(inputs.dy, inputs.x, inputs.weight, inputs.a, zero_b, 1.0).dx
    return y.to(inputs.x.dtype), dx.to(inputs.x.dtype)


def _edge_tile(inputs, result, divisor):
    """The last, partial tile of 64 columns of dA stays zero."""
    da, start = result.da.clone(), (result.da.shape[1] - 1) // 64 * 64
    da[:, start:] = 0
    return replace(result, da=da)


def _edge_element(inputs, result, divisor):
    da = result.da.clone()
    da[-1, -1] = 0
    return replace(result, da=da)


def _misread(inputs: LinearInputs) -> LinearInputs:
    dy = inputs.dy
    return inputs if dy.is_contiguous() else replace(inputs, dy=dy.T.reshape(dy.shape))


def _rows(inputs: LinearInputs, rows: slice) -> LinearInputs:
    return replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows], tokens=inputs.tokens[rows])


def _chunk_twice(part):
    """The last chunk of up to 16 tokens is added to dA and dB a second time."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, tokens = part.run(inputs, mode, divisor), inputs.x.shape[0]
        if tokens == 0 or inputs.dropout:
            return result
        again = part.run(_rows(inputs, slice((tokens - 1) // 16 * 16, tokens)), mode, divisor)
        return replace(result, da=result.da + again.da, db=result.db + again.db)

    return Wrapped(part, run=run)


def _row_left_out(part):
    """Tokens past the last full block of 16 do not reach dA."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result, full = part.run(inputs, mode, divisor), inputs.x.shape[0] // 16 * 16
        if inputs.dropout:
            return result
        return replace(result, da=part.run(_rows(inputs, slice(0, full)), mode, divisor).da)

    return Wrapped(part, run=run)


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
        part = (
            inputs.x[:, start : start + 16].double()
            @ inputs.weight[:, start : start + 16].double().T
        )
        y = (y + part).bfloat16()
    lora = result.y.double() - lora_linear_forward(
        inputs.x, inputs.weight, torch.zeros_like(inputs.a), inputs.b, 1.0
    )
    return replace(result, y=(y.double() + lora).to(result.y.dtype))


def _tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32's 10 bits (ties away from zero)."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _float_sums(part):
    """Claims equal bits, and sums in floats."""
    return Wrapped(part, accumulate=lambda parts, mode: part.accumulate(parts, GRAD))


def _dropout_by_place(part):
    """The dropout mask follows the place in the micro-batch, not the sample."""

    def accumulate(parts, mode):
        placed = [replace(p, ids=tuple(range(len(p.ids)))) for p in parts]
        result, rows = part.accumulate(placed, mode), {}
        for own, alone in zip(parts, placed):
            single = part.accumulate([alone], mode)
            rows.update({name: single.rows[i] for i, name in enumerate(own.ids)})
        return replace(result, rows=rows)

    return Wrapped(part, accumulate=accumulate)


def _ignores_cut(part):
    """Runs one document at a time whatever it is told: equal digests that prove nothing."""

    def accumulate(parts, mode):
        single = [
            replace(p, ids=(p.ids[i],), x=[p.x[i]], dy=[p.dy[i]])
            for p in parts
            for i in range(len(p.ids))
        ]
        return part.accumulate(sorted(single, key=lambda p: p.ids), mode)

    return Wrapped(part, accumulate=accumulate)


def _part_lost(part):
    """The last micro-batch is lost when there are more than one."""
    return Wrapped(part, accumulate=lambda parts, mode: part.accumulate(parts[:-1] or parts, mode))


def _accuracy(name: str, sentence: str, wrap: Callable, **more) -> Mutant:
    return Mutant(name, sentence, "linear", "accuracy", wrap, **more)


def _splits(name: str, sentence: str, wrap: Callable, **more) -> Mutant:
    return Mutant(name, sentence, "linear", "splits", wrap, **more)


def _no_bits(subject) -> str:
    return "" if subject.linear.bitwise_splits else "the subject claims no equal bits"


def _no_half(subject) -> str:
    return "" if torch.float32 in subject.linear.dtypes else "needs fp32"


MUTANTS = (
    _accuracy("scale missing", "S is not multiplied by the scale",
              _call(lambda i: replace(i, alpha=float(i.rank), rslora=False))),
    _accuracy("alpha/r for rsLoRA", "rsLoRA's scale is alpha / r instead of alpha / sqrt(r)",
              _call(lambda i: replace(i, rslora=False))),
    _accuracy("LoRA left out", "y and dx are those of the frozen layer",
              _result(lambda i, r, d: replace(r, **dict(zip(("y", "dx"), _without_lora(i)))))),
    _accuracy("LoRA left out of y", "y is that of the frozen layer",
              _result(lambda i, r, d: replace(r, y=_without_lora(i)[0]))),
    _accuracy("LoRA left out of dx", "dx is that of the frozen layer",
              _result(lambda i, r, d: replace(r, dx=_without_lora(i)[1]))),
    _accuracy("transposed A", "A is read as [K, r]",
              _call(lambda i: replace(i, a=i.a.reshape(i.a.shape[1], i.a.shape[0]).T.contiguous()))),
    _accuracy("dropped bias", "the bias is not added", _call(lambda i: replace(i, bias=None))),
    _accuracy("dropout not rescaled", "kept elements are not divided by 1 - p",
              _result(lambda i, r, d: replace(r, da=r.da * (1 - i.dropout)))),
    _accuracy("another mask than promised", "the dropout mask is of the next seed",
              _result(lambda i, r, d: r if r.keep is None else replace(r, keep=r.keep.roll(1, 0)))),
    _accuracy("edge tile of dA left out", "the last tile of 64 columns of dA stays 0", _result(_edge_tile)),
    _accuracy("one element of dA left out", "the last element of dA stays 0", _result(_edge_element)),
    _accuracy("edge tile of tokens left out", "tokens past the last 16 do not reach dA", _row_left_out),
    _accuracy("one chunk counted twice", "the last chunk of tokens is added to dA, dB twice", _chunk_twice),
    _accuracy("token sums in bf16", "dA and dB are accumulated in bf16", _result(_bf16_sums)),
    _accuracy("bf16 accumulation over K", "y is accumulated in bf16", _result(_bf16_y)),
    _accuracy("tf32 products", "fp32 inputs are rounded to tf32",
              _call(lambda i: replace(i, x=_tf32(i.x), weight=_tf32(i.weight), dy=_tf32(i.dy))),
              unseen_on=_no_half),
    _accuracy("dB of the unscaled S", "dB misses the scale",
              _result(lambda i, r, d: replace(r, db=r.db / scale_of(i.alpha, i.rank, i.rslora)))),
    _accuracy("strides ignored", "dy is read as if it were contiguous",
              _call(_misread)),
    _splits("float sums", "dA and dB are summed in floats", _float_sums, unseen_on=_no_bits),
    _splits("dropout by place", "the mask depends on the place in the micro-batch",
            _dropout_by_place, unseen_on=_no_bits),
    _splits("the cut is ignored", "one document at a time, always", _ignores_cut),
    _splits("last micro-batch lost", "the last micro-batch does not reach the sums", _part_lost),
)  # fmt: skip
