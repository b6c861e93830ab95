"""The gate of a gated feed-forward layer, forward and backward: one pass over memory, no element depends on another.

    h = act(g) * u        dg = dh u act'(g)        du = dh act(g)

Rounding is that of ops/glu.py: act(g) to the dtype before the product, dh u to the dtype before act'. Gate and up are halves of
one row (a fused projection) or tensors of their own: the kernels take two base pointers, an offset and one row stride.
Source: Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.row_tables import glu_tile
from fastlora.kernels.rows import ready


@triton.jit
def activate(b_g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in fp32. Sums with a product in them are explicit fma: the forward and the backward must fuse alike."""
    if ACTIVATION == "gelu":
        # g Phi(g); its derivative Phi(g) + g phi(g)
        b_s = 0.5 + 0.5 * tl.erf(b_g * 0.7071067811865476)
        b_slope = tl.fma(b_g * 0.3989422804014327, tl.exp(-0.5 * b_g * b_g), b_s)
    else:
        b_z = b_g
        if ACTIVATION == "gelu_tanh":
            # 0.5 (1 + tanh(z / 2)) = sigmoid(z), z = 2 sqrt(2 / pi) (g + 0.044715 g^3)
            b_gg = b_g * b_g
            b_z = b_g * tl.fma(b_gg, 0.07135481282642594, 1.5957691216057308)
        else:
            tl.static_assert(ACTIVATION == "silu")
        b_s = 1.0 / (1.0 + tl.exp2(b_z * -1.4426950408889634))  # exp would care for numbers that 1.0 swallows
        b_rest = 1.0 - b_s
        if ACTIVATION == "gelu_tanh":
            b_rest *= tl.fma(b_gg, 0.21406443847927782, 1.5957691216057308)
        b_slope = tl.fma(b_g * b_s, b_rest, b_s)
    b_act = b_g * b_s
    return b_act, b_slope


@triton.jit
def glu_forward_kernel(
    p_gate, p_up, p_hidden,
    F: tl.constexpr, LD: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """p_gate and p_up + UP: rows of F elements, LD apart; p_hidden [M, F]."""
    i = tl.program_id(0)
    i_m = (i // BLOCKS).to(tl.int64)
    o_f = (i % BLOCKS) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_g = tl.load(p_gate + i_m * LD + o_f, mask=m_f, other=0.0)
    b_u = tl.load(p_up + i_m * LD + UP + o_f, mask=m_f, other=0.0)
    b_act, _ = activate(b_g.to(tl.float32), ACTIVATION)
    b_h = b_act.to(b_g.dtype).to(tl.float32) * b_u.to(tl.float32)
    tl.store(p_hidden + i_m * F + o_f, b_h.to(b_g.dtype), mask=m_f)


@triton.jit
def glu_backward_kernel(
    p_dhidden, p_gate, p_up, p_dgate, p_dup, p_hidden,
    F: tl.constexpr, LD: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr, EMIT: tl.constexpr,
    BLOCKS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """p_dhidden, p_hidden [M, F]; the others as in the forward, gradients laid out like gate and up."""
    i = tl.program_id(0)
    i_m = (i // BLOCKS).to(tl.int64)
    o_f = (i % BLOCKS) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_d = tl.load(p_dhidden + i_m * F + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + i_m * LD + o_f, mask=m_f, other=0.0)
    b_u = tl.load(p_up + i_m * LD + UP + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_act, b_slope = activate(b_g.to(tl.float32), ACTIVATION)
    b_act = b_act.to(b_g.dtype).to(tl.float32)
    b_dact = (b_d * b_u).to(b_g.dtype).to(tl.float32)
    tl.store(p_dgate + i_m * LD + o_f, (b_dact * b_slope).to(b_g.dtype), mask=m_f)
    tl.store(p_dup + i_m * LD + UP + o_f, (b_d * b_act).to(b_g.dtype), mask=m_f)
    if EMIT:
        tl.store(p_hidden + i_m * F + o_f, (b_act * b_u).to(b_g.dtype), mask=m_f)


def _forward(gate, up, width: int, stride: int, offset: int, activation: str) -> torch.Tensor:
    rows = gate.shape[0]
    hidden = torch.empty(rows, width, device=gate.device, dtype=gate.dtype)
    if rows:
        tile = glu_tile(launch.arch_of(gate), gate.dtype, width)
        blocks = launch.cdiv(width, tile.bn)
        launch.run(
            glu_forward_kernel, (rows * blocks,), tile, gate, up, hidden,
            F=width, LD=stride, UP=offset, ACTIVATION=activation, BLOCKS=blocks, BF=tile.bn,
        )
    return hidden


def _backward(dhidden, gate, up, dgate, dup, stride: int, offset: int, activation: str, emit: bool):
    rows, width = dhidden.shape
    hidden = torch.empty_like(dhidden) if emit else None
    if rows:
        tile = glu_tile(launch.arch_of(gate), gate.dtype, width)
        blocks = launch.cdiv(width, tile.bn)
        launch.run(
            glu_backward_kernel, (rows * blocks,), tile,
            dhidden, gate, up, dgate, dup, hidden if emit else dhidden,
            F=width, LD=stride, UP=offset, ACTIVATION=activation, EMIT=emit, BLOCKS=blocks, BF=tile.bn,
        )
    return hidden


def glu_forward(gate_up, activation):
    """hidden [M, I] = act(gate) * up from gate_up [M, 2I], gate first; activation of ``ops.glu.ACTIVATIONS``."""
    gate_up = ready(gate_up)
    width = gate_up.shape[1] // 2
    return _forward(gate_up, gate_up, width, 2 * width, width, activation)


def glu_backward(dhidden, gate_up, activation, *, emit=False):
    """(dgate_up [M, 2I], hidden [M, I] or None) from dhidden [M, I]; ``emit``: hidden again, bit-equal to the forward's."""
    dhidden, gate_up = ready(dhidden), ready(gate_up)
    width = dhidden.shape[1]
    dgate_up = torch.empty_like(gate_up)
    hidden = _backward(dhidden, gate_up, gate_up, dgate_up, dgate_up, 2 * width, width, activation, emit)
    return dgate_up, hidden


def glu_pair_forward(gate, up, activation):
    """hidden [M, I] = act(gate) * up from two tensors [M, I]."""
    gate, up = ready(gate), ready(up)
    return _forward(gate, up, gate.shape[1], gate.shape[1], 0, activation)


def glu_pair_backward(dhidden, gate, up, activation):
    """(dgate, dup), each [M, I], from dhidden [M, I]."""
    dhidden, gate, up = ready(dhidden), ready(gate), ready(up)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _backward(dhidden, gate, up, dgate, dup, gate.shape[1], 0, activation, False)
    return dgate, dup
