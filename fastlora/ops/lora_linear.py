"""The LoRA linear as one autograd operation, in both gradient modes.

    S  = s D(x) A^T   [M, r]       Y  = x W^T + S B^T + bias      [M, N]
    dS = s dY B       [M, r]       dX = dY W + D'(dS A)           [M, K]
    dB = dY^T S       [N, r]       dA = dS^T D(x)                 [r, K]

The maths on torch: ops/reference.py; on Triton: ops/triton_path.py. Ordinary mode fills ``.grad``. Exact mode adds to the integer
sums of fastlora/exact.py in its backward and returns None for A and B, because torch would cast an integer gradient silently. Both
are one autograd function over these two implementations. What looks at operators (torch.compile, fakes, dispatch modes, functorch)
finds ordinary mode as ``torch.ops.fastlora.lora_linear``, with a fake and an autograd formula; an eager call of it would cost more
on the host than all of the function.

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


def _as_given(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return a, b  # the reference casts them itself


# Dtypes are settled by then; autocast would round the reference's fp32 products.
def _forward_reference(x, *rest):
    with torch.autocast(x.device.type, enabled=False):
        return reference.forward_ref(x, *rest)


def _backward_reference(dy, *rest, rank: int, **options):
    with torch.autocast(dy.device.type, enabled=False):
        return reference.backward_ref(dy, *rest, **options)


def _implementation(x: torch.Tensor):
    """(what makes A and B ready, forward, backward) for the backend of this tensor."""
    if backend.pick(x) != "triton":
        return _as_given, _forward_reference, _backward_reference
    from fastlora.ops import triton_path  # imported on first use: triton is absent on macOS and Windows

    return triton_path.padded_factors, triton_path.forward_triton, triton_path.backward_triton


def _key(dropout: float, seed: int, tokens: torch.Tensor | None) -> DropoutKey | None:
    return None if dropout == 0.0 else DropoutKey(seed, tokens)


def _forward(x, weight, a, b, scale, bias, dropout, seed, tokens):
    ready, run, _ = _implementation(x)
    return run(x, weight, *ready(a, b, x.dtype), scale, bias, dropout, _key(dropout, seed, tokens))


def _backward(dy, x, weight, a, b, s, scale, dropout, seed, tokens, needs_dx):
    ready, _, run = _implementation(x)
    low_a, low_b = ready(a, b, x.dtype)
    dx, da, db = run(
        dy, x, weight, low_a, low_b, s, scale, dropout, _key(dropout, seed, tokens), rank=a.shape[0], needs_dx=needs_dx
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


class _LoraLinear(torch.autograd.Function):
    """The operation of eager calls, in both modes. ``call``: (scale, dropout, key, sums) of :func:`lora_linear`."""

    # Rows are flattened in here: as operations of their own they would be two more nodes of the graph.
    @staticmethod
    def forward(ctx, x, weight, a, b, bias, call):
        scale, dropout, key, _ = ctx.call = call
        ready, run, ctx.run_backward = _implementation(x)
        # cast and padded once for both directions
        low_a, low_b = ready(a, b, x.dtype)
        y, s = run(_rows(x), weight, low_a, low_b, scale, bias, dropout, key)
        ctx.save_for_backward(x, weight, low_a, low_b, s)
        ctx.set_materialize_grads(False)
        ctx.rank, ctx.dtypes = a.shape[0], (a.dtype, b.dtype)
        # a view made in here would refuse what is done in place to it
        return y if x.dim() == 2 else y.resize_(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 6
        # the wrapper that refuses a second derivative has nothing to do where no graph is made
        return _refusing_a_second(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _gradients(ctx, dy):
    """What the backward of :class:`_LoraLinear` returns; in exact mode A's and B's gradients are added to the sums."""
    x, weight, a, b, s = ctx.saved_tensors
    scale, dropout, key, sums = ctx.call
    arguments = _rows(dy), _rows(x), weight, a, b, s, scale, dropout, key
    needs_dx = ctx.needs_input_grad[0]
    if sums is None:
        dx, da, db = ctx.run_backward(*arguments, rank=ctx.rank, needs_dx=needs_dx)
        da, db = da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1])
    else:
        da = db = None
        with sums[0].adding() as sums_a, sums[1].adding() as sums_b:
            dx, _, _ = ctx.run_backward(*arguments, rank=ctx.rank, needs_dx=needs_dx, sums_a=sums_a, sums_b=sums_b)
    return dx if dx is None or x.dim() == 2 else dx.view(x.shape), None, da, db, None, None


_refusing_a_second = torch.autograd.function.once_differentiable(_gradients)

# Function.apply without its own looks for functorch: they cost more than a launch, and _watched has looked
_apply = super(torch.autograd.Function, _LoraLinear).apply

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _watched(*tensors: torch.Tensor) -> bool:
    """Whether something looks at operators: a compiler, a dispatch mode, a transform, or a tensor of another kind (a fake)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
        or any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def check(x, weight, a, b, bias, dropout, key) -> None:
    """Raise InputError, by name, unless the arguments are what :func:`lora_linear` takes."""
    shape, shape_a, shape_b = weight.shape, a.shape, b.shape
    if not len(shape) == len(shape_a) == len(shape_b) == 2:
        raise InputError(f"weight, a, b: shapes {tuple(shape)}, {tuple(shape_a)}, {tuple(shape_b)}; allowed: 2-D")
    outer, inner = shape
    rank = shape_a[0]
    if x.dim() == 0 or x.shape[-1] != inner:
        raise InputError(f"x: shape {tuple(x.shape)}; its last size must be {inner}, as weight is {tuple(shape)}")
    if shape_a[1] != inner or shape_b != (outer, rank):
        raise InputError(f"a, b: shapes {tuple(shape_a)}, {tuple(shape_b)}; allowed: [r, {inner}] and [{outer}, r] with one r")
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
    if dropout != 0.0:
        check_probability(dropout)
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
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):  # a device's name is slow to make
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check(x, weight, a, b, bias, dropout, key)
    call = scale, dropout, key, sums
    if not _watched(x, weight, a, b):
        return _apply(x, weight, a, b, bias, call)
    if sums is not None:
        return _LoraLinear.apply(x, weight, a, b, bias, call)
    seed, tokens = (0, None) if dropout == 0.0 else (key.seed, key.tokens)
    flat = x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.fastlora.lora_linear(flat, weight, a, b, scale, bias, dropout, seed, tokens)
    return y.reshape(*x.shape[:-1], weight.shape[0])
