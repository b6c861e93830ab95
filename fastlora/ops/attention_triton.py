"""Causal attention a document at a time by Triton kernels (kernels/attention.py): the CUDA path of ops/attention.py."""

from __future__ import annotations

import functools

import numpy as np
import torch

from fastlora.kernels.attention import attention_backward, attention_forward
from fastlora.kernels.edges import Edges
from fastlora.kernels.launch import arch_of
from fastlora.kernels.tables import ATTENTION_BLOCK, ATTENTION_MAX_HEAD
from fastlora.ops.attention_pieces import Rule
from fastlora.stream import by_rows


def fits_head(tensor: torch.Tensor, head: int) -> bool:
    """Whether the kernels serve heads of this width on the tensor's device."""
    return head <= ATTENTION_MAX_HEAD[arch_of(tensor)]


def fits(query: torch.Tensor, spans: tuple[tuple[int, int], ...], head: int) -> bool:
    """Whether the kernels serve these documents: every start and end at a multiple of the block, heads not too wide."""
    return fits_head(query, head) and all(edge % ATTENTION_BLOCK == 0 for span in spans for edge in span)


@functools.lru_cache(maxsize=8)
def document_edges(spans: tuple[tuple[int, int], ...], device: torch.device) -> Edges:
    """The table of these documents."""
    edges = by_rows(np.array(spans, np.int32).reshape(-1, 2), spans, ATTENTION_BLOCK).numpy().T
    starts = np.arange(edges.shape[1], dtype=np.int32) * ATTENTION_BLOCK
    before = starts - edges[0]
    ends = np.append(edges[1], edges[1][-1:])[: len(starts) + len(starts) % 2]
    pairs = np.argsort(starts[::2] - ends.reshape(-1, 2).max(1), kind="stable")
    table = np.zeros((4, len(starts)), np.int32)
    table[:2], table[2], table[3, : len(pairs)] = edges, np.argsort(-before, kind="stable"), pairs
    return Edges(torch.from_numpy(table).to(device), bool(before.sum() < ATTENTION_BLOCK * len(starts)))


class TritonAttention(torch.autograd.Function):
    """q [Hq, T, D], k [Hk, T, D], v [Hk, T, E] -> [T, Hq, E]."""

    @staticmethod
    def forward(ctx, q, k, v, spans, rule: Rule):
        edges = document_edges(spans, q.device)
        out, lse = attention_forward(q, k, v, edges, rule.scale, rule.window, rule.softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rule, ctx.edges = rule, edges
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        rule, edges = ctx.rule, ctx.edges
        grads = attention_backward(dout, q, k, v, out, lse, edges, rule.scale, rule.window, rule.softcap)
        return *grads, None, None
