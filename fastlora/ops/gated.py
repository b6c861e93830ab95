"""The gate between the products of a gated feed-forward layer: in their epilogues where there is such a kernel, else by itself.

    [gate, up] = gate_up(x)      hidden = act(gate) * up      z = down(hidden)

Both ways have the same bits: kernels/gemm_glu.py rounds where kernels/gemm.py and kernels/glu.py store.
"""

from __future__ import annotations

import torch

from fastlora.kernels import gemm_glu
from fastlora.kernels.chunks import Chunks
from fastlora.kernels.glu import glu_backward, glu_forward
from fastlora.kernels.launch import Dropout
from fastlora.ops.beside import Beside
from fastlora.ops.projections import Projections


def gated_forward(gate_up: Projections, x: torch.Tensor, dropout: Dropout | None, activation: str):
    """x [M, K] -> (gate and up [M, 2F], low-rank s or None, hidden [M, F]).

    Args:
        gate_up: gate and up, F output features each, in this order.
        dropout: of their adapters, or None.
        activation: of ``ops.glu.ACTIVATIONS``.
    """
    s, made = gate_up.low(x, dropout), None
    if gate_up.bias is None:
        made = gemm_glu.forward(x, gate_up.weight, s, gate_up.b, gate_up.layout, activation)
    if made is None:
        both = gate_up.product(x, s)
        made = both, glu_forward(both, activation)
    return made[0], s, made[1]


def gated_backward(
    down: Projections, dz: torch.Tensor, s: torch.Tensor | None, dropout: Dropout | None, chunks: Chunks, both: torch.Tensor,
    activation: str, beside: Beside,
):  # fmt: skip
    """dz [M, K] of down's output -> (gradient of ``both`` [M, 2F], hidden [M, F] again, ds, db of :meth:`Projections.backward`)."""
    with beside.product(dz.shape[0] * down.weight.numel()):
        ds, db = down.low_backward(dz, s, dropout, chunks, beside)
        made = gemm_glu.backward(dz, down.weight, ds, down.a, down.layout, activation, both, dropout)
        if made is None:
            made = glu_backward(down.dx(dz, ds, dropout), both, activation, emit=True)
    return *made, ds, db
