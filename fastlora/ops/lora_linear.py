"""The LoRA linear as one autograd operation, in both gradient modes.

    S  = s D(x) A^T   [M, r]       Y  = x W^T + S B^T + bias      [M, N]
    dS = s dY B       [M, r]       dX = dY W + D'(dS A)           [M, K]
    dB = dY^T S       [N, r]       dA = dS^T D(x)                 [r, K]

The maths on torch: ops/reference.py; on Triton: ops/triton_path.py. Ordinary mode is the registered operator
``torch.ops.fastlora.lora_linear`` (fakes and autograd registered, so torch.compile traces it without a break) and fills
``.grad``. Exact mode adds to the integer sums of fastlora/exact.py in its backward and returns None for A and B, because torch
would cast an integer gradient silently; it is an eager autograd function over the same two implementations.

Source of the method: Hu et al., "LoRA" (2021); rank-stabilised scaling: Kalajdzievski, "rsLoRA" (2023).
"""

from __future__ import annotations

import torch

from fastlora.errors import InputError
from fastlora.ops import backend, reference
from fastlora.ops.dropout import DropoutKey, check_probability

MAX_RANK = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIBRARY = torch.library.Library("fastlora", "DEF")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor a, Tensor b, float scale, Tensor? bias, float dropout, int seed, "
    "Tensor? tokens) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor s, float scale, "
    "float dropout, int seed, Tensor? tokens, bool needs_dx) -> (Tensor, Tensor, Tensor)"
)


def _implementation(x: torch.Tensor):
    """(forward, backward) for the backend of this tensor. Dtypes are settled by then, so both run without autocast."""
    forward, backward = _by_backend(x)
    if not torch.is_autocast_enabled(x.device.type):
        return forward, backward
    plain = torch.autocast(x.device.type, enabled=False)
    return plain(forward), plain(backward)


def _by_backend(x: torch.Tensor):
    if backend.pick(x) == "triton":
        from fastlora.ops import triton_path  # imported on first use: triton is absent on macOS and Windows

        return triton_path.forward_triton, triton_path.backward_triton
    return reference.forward_ref, reference.backward_ref


def _key(dropout: float, seed: int, tokens: torch.Tensor | None) -> DropoutKey | None:
    return None if dropout == 0.0 else DropoutKey(seed, tokens)


def _forward(x, weight, a, b, scale, bias, dropout, seed, tokens):
    return _implementation(x)[0](x, weight, a, b, scale, bias, dropout, _key(dropout, seed, tokens))


def _backward(dy, x, weight, a, b, s, scale, dropout, seed, tokens, needs_dx):
    dx, da, db = _implementation(x)[1](
        dy, x, weight, a, b, s, scale, dropout, _key(dropout, seed, tokens), needs_dx=needs_dx
    )
    if dx is None:
        dx = x.new_empty(0)
    return dx, da.to(a.dtype), db.to(b.dtype)


def _stored_rank(x: torch.Tensor, rank: int) -> int:
    if backend.pick(x) != "triton":
        return rank
    from fastlora.kernels.launch import padded_rank  # imported on first use: triton is absent on macOS and Windows

    return padded_rank(rank)


def _forward_fake(x, weight, a, b, scale, bias, dropout, seed, tokens):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], _stored_rank(x, a.shape[0]))


def _backward_fake(dy, x, weight, a, b, s, scale, dropout, seed, tokens, needs_dx):
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):
    x, weight, a, b, scale, _bias, dropout, seed, tokens = inputs
    ctx.save_for_backward(x, weight, a, b, output[1], tokens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed


def _autograd_backward(ctx, dy, _):
    nothing = (None,) * 9
    if dy is None:
        return nothing
    x, weight, a, b, s, tokens = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    dx, da, db = torch.ops.fastlora.lora_linear_backward(
        dy, x, weight, a, b, s, ctx.scale, ctx.dropout, ctx.seed, tokens, needs_dx
    )
    return (dx if needs_dx else None, None, da, db) + (None,) * 5


for _name, _run, _fake in (
    ("lora_linear", _forward, _forward_fake),
    ("lora_linear_backward", _backward, _backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlora::lora_linear", _autograd_backward, setup_context=_setup_context, lib=_LIBRARY
)


class _ExactLoraLinear(torch.autograd.Function):
    """The same operation in exact mode: its backward adds to integer sums."""

    # Rows are flattened in here: as operations of their own they would be two more nodes of the graph.
    @staticmethod
    def forward(ctx, x, weight, a, b, scale, bias, dropout, key, sums):
        flat = x.reshape(-1, x.shape[-1])
        forward, ctx.run_backward = _implementation(flat)
        if backend.pick(flat) == "triton":
            from fastlora.ops import triton_path

            # cast and padded once for both directions
            a, b = triton_path.padded_factors(a, b, x.dtype)
        y, s = forward(flat, weight, a, b, scale, bias, dropout, key)
        ctx.save_for_backward(x, weight, a, b, s)
        ctx.scale, ctx.dropout, ctx.key, ctx.sums = scale, dropout, key, sums
        # a view made in here would refuse what is done in place to it
        return y.resize_(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, a, b, s = ctx.saved_tensors
        with ctx.sums[0].adding() as sums_a, ctx.sums[1].adding() as sums_b:
            dx, _, _ = ctx.run_backward(
                dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), weight, a, b, s, ctx.scale, ctx.dropout, ctx.key,
                needs_dx=ctx.needs_input_grad[0], sums_a=sums_a, sums_b=sums_b,
            )  # fmt: skip
        return (dx if dx is None or x.dim() == 2 else dx.view(x.shape),) + (None,) * 8


def check(x, weight, a, b, bias, dropout, key) -> None:
    """Raise InputError, by name, unless the arguments are what :func:`lora_linear` takes."""
    if weight.dim() != 2 or a.dim() != 2 or b.dim() != 2:
        raise InputError(f"weight, a, b: shapes {tuple(weight.shape)}, {tuple(a.shape)}, {tuple(b.shape)}; allowed: 2-D")
    outer, inner = weight.shape
    rank = a.shape[0]
    if x.dim() == 0 or x.shape[-1] != inner:
        raise InputError(f"x: shape {tuple(x.shape)}; its last size must be {inner}, as weight is {tuple(weight.shape)}")
    if a.shape[1] != inner or b.shape != (outer, rank):
        raise InputError(
            f"a, b: shapes {tuple(a.shape)}, {tuple(b.shape)}; allowed: [r, {inner}] and [{outer}, r] with one r"
        )
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"a: rank {rank}; allowed: 1 to {MAX_RANK}")
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise InputError(
            f"x, weight: dtypes {x.dtype}, {weight.dtype}; allowed: one of bfloat16, float16, float32, the same for both"
        )
    if bias is not None and (bias.shape != (outer,) or bias.dtype != x.dtype):
        raise InputError(f"bias: {bias.dtype} {tuple(bias.shape)}; allowed: {x.dtype} [{outer}]")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise InputError("weight, bias: requires_grad is True; the base is frozen, call requires_grad_(False) on it")
    check_probability(dropout)
    if dropout > 0.0:
        rows = x.numel() // inner if inner else 0
        have = "None" if key is None else f"a DropoutKey of {key.tokens.numel()} tokens"
        if key is None or key.tokens.numel() != rows:
            raise InputError(f"key: {have} with dropout {dropout}; allowed: a DropoutKey of one token key a row, {rows}")


def lora_linear(x, weight, a, b, scale, bias=None, *, dropout=0.0, key=None, sums=None):
    """Y = x W^T + scale * D(x) A^T B^T + bias, with W and bias frozen.

    Args:
        x: [..., K], bf16, fp16 or fp32; any strides.
        weight: [N, K] in x's dtype, frozen. bias: [N] or None, frozen.
        a: [r, K]; b: [N, r]; fp32 masters or x's dtype; rounded to x's dtype for the products. r from 1 to 256.
        scale: alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA).
        dropout: probability of D (0, or from 2^-16 to 1 - 2^-16), applied to x on the LoRA branch alone (PEFT's meaning).
        key: :class:`fastlora.DropoutKey` with M token keys (M the product of x's leading sizes); needed with dropout.
        sums: None: gradients of a and b go to ``.grad``. A pair (sum of dA, sum of dB) of
            :class:`fastlora.exact.TokenSum` (or of :class:`fastlora.token_sum.SumSlice`): the backward adds exact sums to
            them and ``.grad`` stays empty.

    Returns:
        [..., N] in x's dtype, rounded once from fp32 (reference path with 16-bit input: likewise).

    Raises:
        InputError: a shape, dtype, rank or probability that is not allowed, by name.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check(x, weight, a, b, bias, dropout, key)
    if sums is not None:
        return _ExactLoraLinear.apply(x, weight, a, b, scale, bias, dropout, key, sums)
    seed, tokens = (0, None) if dropout == 0.0 else (key.seed, key.tokens)
    flat = x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.fastlora.lora_linear(flat, weight, a, b, scale, bias, dropout, seed, tokens)
    return y.reshape(*x.shape[:-1], weight.shape[0])
