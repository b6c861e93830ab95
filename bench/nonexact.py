"""The fastest configuration that gives up exactness: the library's fused layers with what would be taken if bits did not matter.

Float sums, cuDNN's attention (torch's SDPA) and cuBLAS for the head, the one product without an adapter. It exists to say what
exactness costs; the library has none of it. The names it replaces in the library stand only inside :func:`active`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastlora.errors import InputError
from fastlora.stream import Stream

NAME = "nonexact"
# Of the check before timing, in place of uneven documents: two, each over one tile.
LENGTHS = (200, 200)


def documents(stream: Stream) -> int:
    """How many documents of equal padded length the stream is made of.

    Raises:
        InputError: they are not equally long: cuDNN's attention sees them as one batch.
    """
    padded = {stop - start for start, stop in stream.spans}
    if len(padded) != 1:
        raise InputError(f"{NAME}: documents of {', '.join(map(str, sorted(padded)))} tokens; allowed are documents of one length")
    return len(stream.spans)


def _batched(heads: torch.Tensor, count: int) -> torch.Tensor:
    """[heads, T, D] -> [count, heads, T / count, D], a view."""
    return heads.unflatten(1, (count, -1)).transpose(0, 1)


def _attention(count: int) -> tuple[Callable, Callable]:
    """Forward and backward with the signatures of kernels/attention.py; what the backward needs travels in lse's place."""

    def forward(q, k, v, edges, scale, window=None, softcap=None):
        if window is not None or softcap is not None:
            raise InputError(f"{NAME}: attention with a window or a soft cap; allowed is plain causal attention")
        # Without a GPU only the plumbing is tested.
        kind = SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH
        leaves = tuple(_batched(t, count).detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad(), sdpa_kernel(kind):
            out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=q.shape[0] != k.shape[0])
        tokens = q.shape[1]
        return out.detach().transpose(1, 2).reshape(tokens, q.shape[0], v.shape[2]).contiguous(), (leaves, out)

    def backward(dout, q, k, v, out, lse, edges, scale, window=None, softcap=None, *, into):
        leaves, made = lse
        gradients = torch.autograd.grad(made, leaves, _batched(dout.transpose(0, 1), count))
        for view, gradient in zip(into, gradients, strict=True):
            _batched(view, count).copy_(gradient)
        return into

    return forward, backward


def _head_tile(h, weight, labels, terms, want_grad):
    """(row losses, gradient or None) of a tile of the head, as the library's, with cuBLAS for its two products."""
    from fastlora.kernels.cross_entropy import cross_entropy_

    logits = torch.mm(h, weight.t())
    losses = cross_entropy_(logits, labels, gradient=want_grad, **terms._asdict())
    return losses, torch.mm(logits, weight) if want_grad else None


@contextlib.contextmanager
def active(stream: Stream) -> Iterator[None]:
    """Forward and backward of one micro-batch of equal documents, both inside the block.

    Raises:
        InputError: documents of several lengths; from the forward: attention that is not plainly causal.
    """
    # Here, because they need Triton, and who only parses a system's name may not have it.
    from fastlora.ops import decoder_layer, linear_cross_entropy

    forward, backward = _attention(documents(stream))
    replaced = (
        (decoder_layer, "attention_forward", forward), (decoder_layer, "attention_backward", backward),
        (linear_cross_entropy, "_tile_triton", _head_tile),
    )  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
