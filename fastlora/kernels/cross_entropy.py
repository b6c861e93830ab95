"""Cross-entropy of rows of logits, and their gradient in place: one program a row, so no row's bits depend on another's.

    z = f(logit)      f(x) = logit_scale * c tanh(x / c), without c: logit_scale * x
    loss = log sum exp z - z[label]      d loss / d logit = f'(logit) (softmax(z) - onehot(label))

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for the running maximum and sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tables import Tile


@triton.jit
def head_map(b_x, scale, softcap, SOFTCAP: tl.constexpr):
    """(f(x), f'(x)) in fp32."""
    if SOFTCAP:
        b_t = 2.0 * tl.sigmoid(2.0 * b_x / softcap) - 1.0
        return scale * softcap * b_t, scale * (1.0 - b_t * b_t)
    return scale * b_x, scale


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_loss, scale, softcap, V: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """p_logits [M, V], overwritten with the gradient if GRADIENT; p_labels int64 [M]; p_loss fp32 [M]."""
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_m * V
    label = tl.load(p_labels + i_m)
    b_max = tl.full((BV,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BV,), tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        b_z, _ = head_map(b_x, scale, softcap, SOFTCAP)
        b_z = tl.where(o_v < V, b_z, float("-inf"))
        b_new = tl.maximum(b_max, b_z)
        # a lane that has seen nothing yet holds minus infinity: subtract 0 there
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.exp(b_z - b_safe)
        b_max = b_new
    top = tl.max(b_max, 0)
    total = tl.sum(b_sum * tl.exp(b_max - top), 0)
    target, _ = head_map(tl.load(p_row + label).to(tl.float32), scale, softcap, SOFTCAP)
    tl.store(p_loss + i_m, tl.log(total) + top - target)
    if GRADIENT:
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)
            b_z, b_slope = head_map(b_x, scale, softcap, SOFTCAP)
            b_grad = (tl.exp(b_z - top) / total - (o_v == label).to(tl.float32)) * b_slope
            tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def cross_entropy_(logits, labels, *, softcap=None, logit_scale=1.0, gradient):
    """Row losses fp32 [M]; ``logits`` [M, V], contiguous, hold the gradient afterwards if ``gradient``.

    ``labels``: int64 [M], each within the vocabulary.
    """
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, device=logits.device, dtype=torch.float32)
    if rows:
        tile = Tile(1, 4096 if logits.is_cuda else 256, warps=8, stages=2)
        launch.run(
            cross_entropy_kernel, (rows,), tile, logits, labels, loss, float(logit_scale), float(softcap or 1.0),
            V=vocabulary, SOFTCAP=softcap is not None, GRADIENT=gradient, BV=tile.bn,
        )
    return loss
