"""Faults of the LoRA linear's maths, and adapters of which a part never takes effect."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped, base_alone, in_call, in_result
from verify.oracle.linear import drop, scale_of
from verify.subject import LinearInputs, LinearResult


def _scale(inputs: LinearInputs) -> float:
    return scale_of(inputs.alpha, inputs.rank, inputs.rslora)


def _keep(inputs: LinearInputs, result: LinearResult) -> torch.Tensor | None:
    return None if result.keep is None else result.keep.to(inputs.x.device)


def _frozen(names: tuple[str, ...], inputs, result, divisor) -> LinearResult:
    """The frozen layer's y or dx, correctly rounded."""
    base = dict(zip(("y", "dx"), base_alone(inputs)))
    return replace(result, **{name: base[name].to(inputs.x.dtype) for name in names})


def _all_dropped(inputs, result, divisor) -> LinearResult:
    """The base layer sees the dropped x as well."""
    keep = _keep(inputs, result)
    moved = drop(inputs.x, keep, inputs.dropout) - inputs.x.double()
    return replace(result, y=(result.y.double() + moved @ inputs.weight.double().T).to(result.y.dtype))


def _unmasked_dx(inputs, result, divisor) -> LinearResult:
    """dS A reaches dx without the mask."""
    ds = _scale(inputs) * (inputs.dy.double() @ inputs.b.double())
    lora = ds @ inputs.a.double()
    masked = drop(lora, _keep(inputs, result), inputs.dropout)
    return replace(result, dx=(result.dx.double() - masked + lora).to(result.dx.dtype))


def _redrawn(part):
    """The backward runs the forward again, with the next mask."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        result = part.run(inputs, mode, divisor)
        if not inputs.dropout:
            return result
        again = part.run(replace(inputs, seed=inputs.seed + 1), mode, divisor)
        return replace(again, y=result.y, keep=result.keep)

    return Wrapped(part, run=run)


def _one_block(part):
    """As many rows of A and columns of B as the first of two adapters has; the second is not applied."""

    def run(inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        first = (inputs.rank + 1) // 2
        a, b = inputs.a.clone(), inputs.b.clone()
        a[first:], b[:, first:] = 0, 0
        return part.run(replace(inputs, a=a, b=b), mode, divisor)

    return Wrapped(part, run=run)


def _head_dropped(inputs, result, divisor) -> LinearResult:
    """The layer's weight is read, its adapter is not: no LoRA in y and dx, no gradient."""
    return replace(
        _frozen(("y", "dx"), inputs, result, divisor), da=torch.zeros_like(result.da), db=torch.zeros_like(result.db)
    )


def _fault(name: str, sentence: str, wrap: Callable, modelled_on: str = "", group: str = "maths") -> Mutant:
    return Mutant(name, sentence, "linear", "accuracy", wrap, group=group, modelled_on=modelled_on)


_injection = functools.partial(_fault, group="injection")

MUTANTS = (
    _fault("scale missing", "alpha is ignored: S is not multiplied by the scale",
           in_call(lambda i: replace(i, alpha=float(i.rank), rslora=False)), "adapter-hub/adapters#770"),
    _fault("alpha not divided by r", "the scale is alpha itself",
           in_call(lambda i: replace(i, alpha=i.alpha * i.rank, rslora=False)), "Blaizzy/mlx-vlm#986"),
    _fault("alpha/r for rsLoRA", "rsLoRA's scale is alpha / r instead of alpha / sqrt(r)",
           in_call(lambda i: replace(i, rslora=False)), "vllm-project/vllm#6909"),
    _fault("LoRA left out", "y and dx are those of the frozen layer",
           in_result(functools.partial(_frozen, ("y", "dx")))),
    _fault("LoRA left out of y", "y is that of the frozen layer", in_result(functools.partial(_frozen, ("y",)))),
    _fault("LoRA left out of dx", "dx is that of the frozen layer", in_result(functools.partial(_frozen, ("dx",)))),
    _fault("transposed A", "A is read as [K, r]",
           in_call(lambda i: replace(i, a=i.a.reshape(i.a.shape[1], i.a.shape[0]).T.contiguous()))),
    _fault("dropped bias", "the bias is not added", in_call(lambda i: replace(i, bias=None)), "paiml/aprender#2260"),
    _fault("dropout not rescaled", "kept elements are not divided by 1 - p",
           in_result(lambda i, r, d: replace(r, da=r.da * (1 - i.dropout)))),
    _fault("dropout before the base", "the frozen layer sees the dropped x too", in_result(_all_dropped)),
    _fault("dropout not in dx", "dS A reaches dx without the mask", in_result(_unmasked_dx)),
    _fault("another mask than promised", "the dropout mask is of the next row",
           in_result(lambda i, r, d: r if r.keep is None else replace(r, keep=r.keep.roll(1, 0)))),
    _fault("dropout redrawn in recompute", "the backward's mask is not the forward's", _redrawn,
           "openai/guided-diffusion#167", group="trainer"),
    _fault("dB of the unscaled S", "dB misses the scale", in_result(lambda i, r, d: replace(r, db=r.db / _scale(i)))),
    _fault("scale twice in dA", "dA has the scale squared", in_result(lambda i, r, d: replace(r, da=r.da * _scale(i)))),
    Mutant("gradients clamped in the kernel", "dA is cut to [-1, 1], so it is not linear in dY", "linear", "gradients",
           in_result(lambda i, r, d: replace(r, da=r.da.clamp(-1, 1)))),
    _injection("lm_head's adapter dropped", "a fused loss reads the frozen weight: the adapter has no effect and no gradient",
               in_result(_head_dropped), "huggingface/trl#4612"),
    _injection("second adapter dropped", "of two adapters on one layer only the first is applied", _one_block,
               "huggingface/peft#1135"),
)  # fmt: skip
