"""Causal attention, a document at a time: transformers' attention function "fastlora".

Documents are the spans of the active stream, so nothing of size T x T over the stream ever exists.
A piece of a document is computed whole on one thread (see ``attention_pieces``), forward and
backward, so its bits depend on the document alone. Padding sits behind the real tokens of its
document, where causal attention does not look.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastlora import blocks, stream
from fastlora.errors import InputError
from fastlora.ops import backend
from fastlora.ops.attention_pieces import Blocked, Fused, Gradients, Rule, Tensors

NAME = "fastlora"


def _over_pieces(t: Tensors, rule: Rule, spans, call) -> None:
    """``call(method, start, stop, piece)`` for every piece of every document."""
    items = []
    for start, stop in spans:
        method = Fused if Fused.fits(t, rule, stop - start) else Blocked
        items += [(method, start, stop, piece) for piece in method.pieces(t, rule, start, stop)]
    items.sort(key=lambda item: item[1] - item[2])  # long ones first: the threads end together
    if t.q.device.type == "cpu":
        blocks.run(lambda item: call(*item), items)
    else:
        for item in items:
            call(*item)


def _sum_groups(share: torch.Tensor, groups: int) -> torch.Tensor:
    """fp32 [Hq, T, D] -> [Hq / groups, T, D], the heads of a group added one after another."""
    by_group = share.view(-1, groups, *share.shape[1:])
    total = by_group[:, 0]
    for member in range(1, groups):
        total = total + by_group[:, member]
    return total


class _Attention(torch.autograd.Function):
    """q [Hq,T,D], k [Hk,T,D], v [Hk,T,E] -> [T,Hq,E]."""

    @staticmethod
    def forward(ctx, q, k, v, spans, rule):
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        t = Tensors(q, k, v, out, lse)
        _over_pieces(t, rule, spans, lambda method, *rest: method.forward(t, rule, *rest))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rule, ctx.spans = rule, spans
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        t, rule = Tensors(*ctx.saved_tensors), ctx.rule
        # Each query head keeps its share of dk and dv apart; they are added in the order of heads.
        dk, dv = (
            torch.empty(t.q.shape[0], *x.shape[1:], dtype=torch.float32, device=x.device)
            for x in (t.k, t.v)
        )
        g = Gradients(dout, torch.empty_like(t.q), dk, dv)
        _over_pieces(t, rule, ctx.spans, lambda method, *rest: method.backward(t, g, rule, *rest))
        dk, dv = (_sum_groups(share, t.groups).to(t.k.dtype) for share in (dk, dv))
        return g.dq, dk, dv, None, None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: tuple[tuple[int, int], ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention inside each span.

    Args:
        query: [1, Hq, T, D]; key: [1, Hk, T, D]; value: [1, Hk, T, E]; Hk divides Hq; one dtype.
        spans: (start, stop) of every document; together they cover 0 to T.
        scale: multiplies q k^T.
        window: a query sees itself and the ``window - 1`` tokens before it; None: all before it.
        softcap: c of c tanh(S / c); None: none.

    Returns:
        [1, T, Hq, E] in the query's dtype.

    Raises:
        InputError: more than one row, heads that do not divide, or spans that do not cover T.
    """
    heads, kv_heads, tokens = query.shape[1], key.shape[1], query.shape[2]
    if query.shape[0] != 1:
        raise InputError(f"query: {query.shape[0]} rows; a stream is one row of tokens")
    if heads % kv_heads:
        raise InputError(f"key: {kv_heads} heads for {heads} query heads; they must divide")
    if (spans[-1][1] if spans else 0) != tokens or key.shape[2] != tokens:
        raise InputError(
            f"query, key: {tokens} and {key.shape[2]} tokens, but the active stream has "
            f"{spans[-1][1] if spans else 0}; run the whole stream in one forward without a cache"
        )
    function = _function(query, value, spans)
    out = function.apply(query[0], key[0], value[0], spans, Rule(scale, window, softcap))
    return out.unsqueeze(0)


def _function(query: torch.Tensor, value: torch.Tensor, spans) -> type[torch.autograd.Function]:
    """The Triton kernels on a GPU when the documents are aligned to their block, else the pieces in torch."""
    if spans and backend.pick(query) == "triton":
        from fastlora.ops import (
            attention_triton,
        )  # imported on first use: triton is absent on macOS and Windows

        if attention_triton.fits(query, spans, max(query.shape[3], value.shape[3])):
            return attention_triton.TritonAttention
    return _Attention


def _softcapped(module, query, key, value, mask, scale, softcap):
    """Plain attention with a soft-cap for calls without a stream (generation); sdpa has none."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        shape, late = scores.shape[-2:], key.shape[2] - query.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril_(late)
    if mask is not None:
        fill = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, fill) if mask.dtype == torch.bool else scores + mask
    out = torch.matmul(functional.softmax(scores, dim=-1).to(value.dtype), value)
    return out.transpose(1, 2).contiguous()


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: shapes as in :func:`attention`; output [1, T, Hq, E].

    Without an active stream this is "sdpa" (and a plain soft-cap, which sdpa lacks).

    Raises:
        InputError: under a stream: dropout, a mask tensor, attention sinks, a position bias or
            attention that is not causal.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    current = stream.active()
    if current is None:
        if softcap is not None:
            return _softcapped(module, query, key, value, attention_mask, scale, softcap), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    for wrong, what in (
        (dropout > 0.0, f"attention dropout is {dropout}; set it to 0"),
        (
            attention_mask is not None,
            "attention_mask is given; the stream's documents are the mask",
        ),
        (kwargs.get("s_aux") is not None, "attention sinks (s_aux) are not supported"),
        (kwargs.get("position_bias") is not None, "a position bias is not supported"),
        (not causal, "attention that is not causal is not supported"),
    ):
        if wrong:
            raise InputError(f"attention 'fastlora' in {type(module).__name__}: {what}")
    return attention(query, key, value, current.spans, scale, sliding_window, softcap), None


def attention_mask(*args, **kwargs) -> torch.Tensor | None:
    """transformers' mask interface: no mask under an active stream, else that of "sdpa"."""
    return None if stream.active() is not None else sdpa_mask(*args, **kwargs)


def register() -> str:
    """Make "fastlora" known to transformers (again changes nothing); returns the name."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)
    return NAME
