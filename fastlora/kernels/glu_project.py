"""The gate and S of the down projection in one pass: h = act(g) u and S = scale h A^T, so that S does not read h again.

One program owns BM rows and walks the features as project.py does: h has the bits of glu.py, S those of project.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.glu import activate
from fastlora.kernels.rows import ready
from fastlora.kernels.tables import glu_project_tile


@triton.jit(do_not_specialize=["M"])
def glu_project_kernel(
    p_both, p_w, p_scale, p_hidden, p_s, M,
    F: tl.constexpr, C: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """p_both [M, 2F], gate first; p_w [C, F]; p_scale fp32 [C]; p_hidden [M, F]; p_s [M, C]."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_c = tl.arange(0, C)
    m_m = o_m < M
    b_acc = tl.zeros((BM, C), dtype=tl.float32)
    for i_f in range(0, F, BF):
        o_f = i_f + tl.arange(0, BF)
        m_f = o_f < F
        m = m_m[:, None] & m_f[None, :]
        b_g = tl.load(p_both + o_m[:, None] * (2 * F) + o_f[None, :], mask=m, other=0.0)
        b_u = tl.load(p_both + o_m[:, None] * (2 * F) + F + o_f[None, :], mask=m, other=0.0)
        b_w = tl.load(p_w + o_c[None, :] * F + o_f[:, None], mask=m_f[:, None], other=0.0)
        b_act, _ = activate(b_g.to(tl.float32), ACTIVATION)
        b_h = (b_act.to(b_g.dtype).to(tl.float32) * b_u.to(tl.float32)).to(b_g.dtype)
        tl.store(p_hidden + o_m[:, None] * F + o_f[None, :], b_h, mask=m)
        b_acc = tl.dot(b_h, b_w, b_acc, input_precision=PRECISION)
    b_acc *= tl.load(p_scale + o_c)[None, :]
    tl.store(p_s + o_m[:, None] * C + o_c[None, :], b_acc.to(p_s.dtype.element_ty), mask=m_m[:, None])


def glu_project(gate_up, activation, weight, layout):
    """(hidden [M, F], S [M, C] as of ``project(hidden, weight, layout)``), or None where two passes are as fast.

    Args:
        gate_up: [M, 2F], gate first; activation of ``ops.glu.ACTIVATIONS``.
        weight: [C, F], contiguous; layout: :class:`fastlora.kernels.columns.Columns` of C columns.
    """
    gate_up = ready(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    tile = glu_project_tile(launch.arch_of(gate_up), gate_up.dtype, layout.columns)
    # a program a multiprocessor, or most of them: with fewer the gate alone, whose programs are many, is faster
    if tile is None or launch.cdiv(rows, tile.bm) * 4 < launch.persistent_programs(gate_up.device) * 3:
        return None
    hidden = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    s = torch.empty(rows, layout.columns, device=gate_up.device, dtype=gate_up.dtype)
    launch.run(
        glu_project_kernel, (launch.cdiv(rows, tile.bm),), tile,
        gate_up, weight, layout.scale_of_columns(gate_up.device), hidden, s, rows,
        F=width, C=layout.columns, ACTIVATION=activation, PRECISION="ieee" if gate_up.dtype == torch.float32 else "tf32",
        BM=tile.bm, BF=tile.bk,
    )  # fmt: skip
    return hidden, s
