"""Cross-entropy of rows of logits, and their gradient in place: one program a row, so no row's bits depend on another's.

    z = f(logit)      f(x) = logit_scale * c tanh(x / c), without c: logit_scale * x      l = log sum exp z
    loss = l - (1 - e) z[label] - e mean(z) + k l^2
    d loss / d logit = f'(logit) ((1 + 2 k l) softmax(z) - (1 - e) onehot(label) - e / V)

e is the label smoothing and k the coefficient of the z-loss; where one is 0 its arithmetic is not compiled.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for the running maximum and sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.row_tables import cross_entropy_tile


@triton.jit
def head_map(b_x, scale, softcap, SOFTCAP: tl.constexpr):
    """(f(x), f'(x)) in fp32."""
    if SOFTCAP:
        b_t = 2.0 * tl.sigmoid(2.0 * b_x / softcap) - 1.0
        b_z = scale * softcap * b_t
        b_slope = scale * (1.0 - b_t * b_t)
    else:
        b_z = scale * b_x
        b_slope = scale
    return b_z, b_slope


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_loss, scale, softcap, smoothing, z_loss, V: tl.constexpr, SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr, ZLOSS: tl.constexpr, GRADIENT: tl.constexpr, BV: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """p_logits [M, V], overwritten with the gradient if GRADIENT; p_labels int64 [M]; p_loss fp32 [M]."""
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_m * V
    label = tl.load(p_labels + i_m)
    # EACH elements a lane: one new maximum, and one correction of the sum so far, for all of them
    o_e = tl.arange(0, BV // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    b_max = tl.full((BV // EACH,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BV // EACH,), tl.float32)
    if SMOOTH:
        b_all = tl.zeros((BV // EACH,), tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + o_e
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        b_z, _ = head_map(b_x, scale, softcap, SOFTCAP)
        if SMOOTH:
            b_all += tl.sum(tl.where(o_v < V, b_z, 0.0), 1)
        b_z = tl.where(o_v < V, b_z, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        # a lane that has seen nothing yet holds minus infinity: subtract 0 there
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.sum(tl.exp(b_z - b_safe[:, None]), 1)
        b_max = b_new
    top = tl.max(b_max, 0)
    total = tl.sum(b_sum * tl.exp(b_max - top), 0)
    target, _ = head_map(tl.load(p_row + label).to(tl.float32), scale, softcap, SOFTCAP)
    normalizer = tl.log(total) + top
    loss = normalizer - target
    if SMOOTH:
        loss += smoothing * (target - tl.sum(b_all, 0) / V)
    if ZLOSS:
        loss += z_loss * normalizer * normalizer
    tl.store(p_loss + i_m, loss)
    if GRADIENT:
        share = 1.0 / total
        # from the row's end, which the caches still hold
        for i_back in range(0, V, BV):
            o_v = (V - 1) // BV * BV - i_back + tl.arange(0, BV)
            b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32)
            b_z, b_slope = head_map(b_x, scale, softcap, SOFTCAP)
            b_p = tl.exp(b_z - top) * share
            b_hit = (o_v == label).to(tl.float32)
            if ZLOSS:
                b_p *= 1.0 + 2.0 * z_loss * normalizer
            if SMOOTH:
                b_p -= smoothing / V
                b_hit *= 1.0 - smoothing
            b_grad = (b_p - b_hit) * b_slope
            tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < V)


def cross_entropy_(logits, labels, *, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0, gradient):
    """Row losses fp32 [M]; ``logits`` [M, V], contiguous, hold the gradient afterwards if ``gradient``.

    ``labels``: int64 [M], each within the vocabulary. ``label_smoothing`` is e above, ``z_loss`` k.
    """
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, device=logits.device, dtype=torch.float32)
    if rows:
        tile = cross_entropy_tile(launch.arch_of(logits))
        launch.run(
            cross_entropy_kernel, (rows,), tile, logits, labels, loss, float(logit_scale), float(softcap or 1.0),
            float(label_smoothing), float(z_loss), V=vocabulary, SOFTCAP=softcap is not None,
            SMOOTH=label_smoothing > 0, ZLOSS=z_loss > 0, GRADIENT=gradient, BV=tile.bn, EACH=tile.bk,
        )
    return loss
