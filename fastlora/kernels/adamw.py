"""AdamW over many parameters in one launch: the squares of the gradient for its norm, and the update.

The maths and its order are those of fastlora/optim.py, in float64 with every operation rounded by itself (no fused multiply-add), so
both paths give the same bits. Parameters are found through a table of pointers, as in "multi-tensor apply" (NVIDIA Apex): a launch a
parameter would cost more than its arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table: addresses of the raw gradient, p, m and v, and how many elements.
FIELDS = 5


@triton.jit
def block_of(p_table, p_where, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """(the parameter's row of the table, offsets of this program's elements, their mask)."""
    p_row = p_table + tl.load(p_where + tl.program_id(0) * 2).to(tl.int64) * FIELDS
    o_e = tl.load(p_where + tl.program_id(0) * 2 + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return p_row, o_e, o_e < tl.load(p_row + 4)


@triton.jit
def gradient_of(p_row, o_e, m_e, divisor, INTEGER: tl.constexpr):
    """The gradient, divided once in float64 and rounded once to fp32, as float64."""
    if INTEGER:
        b_raw = tl.load(tl.load(p_row).to(tl.pointer_type(tl.int64)) + o_e, mask=m_e, other=0)
        b_g = b_raw.to(tl.float64) * 9.094947017729282e-13  # 2^-40, the unit
    else:
        b_raw = tl.load(tl.load(p_row).to(tl.pointer_type(tl.float32)) + o_e, mask=m_e, other=0.0)
        b_g = b_raw.to(tl.float64)
    return (b_g / divisor).to(tl.float32).to(tl.float64)


@triton.jit
def squares_kernel(p_table, p_where, p_scalars, p_out, INTEGER: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """p_out fp64 [programs]: the sum of squares of each block."""
    p_row, o_e, m_e = block_of(p_table, p_where, FIELDS, BLOCK)
    b_g = gradient_of(p_row, o_e, m_e, tl.load(p_scalars), INTEGER)
    tl.store(p_out + tl.program_id(0), tl.sum(b_g * b_g, 0))


@triton.jit
def adamw_kernel(p_table, p_where, p_scalars, INTEGER: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """p, m and v in place. p_scalars fp64: divisor, clip factor, beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1^t, 1 - beta2^t, eps,
    1 - lr decay, lr."""
    p_row, o_e, m_e = block_of(p_table, p_where, FIELDS, BLOCK)
    b_g = gradient_of(p_row, o_e, m_e, tl.load(p_scalars), INTEGER) * tl.load(p_scalars + 1)
    p_p = tl.load(p_row + 1).to(tl.pointer_type(tl.float32)) + o_e
    p_m = tl.load(p_row + 2).to(tl.pointer_type(tl.float32)) + o_e
    p_v = tl.load(p_row + 3).to(tl.pointer_type(tl.float32)) + o_e
    b_m = tl.load(p_m, mask=m_e, other=0.0).to(tl.float64)
    b_v = tl.load(p_v, mask=m_e, other=0.0).to(tl.float64)
    b_p = tl.load(p_p, mask=m_e, other=0.0).to(tl.float64)
    b_m = b_m * tl.load(p_scalars + 2) + b_g * tl.load(p_scalars + 3)
    b_v = b_v * tl.load(p_scalars + 4) + (b_g * b_g) * tl.load(p_scalars + 5)
    b_low = tl.sqrt(b_v / tl.load(p_scalars + 7)) + tl.load(p_scalars + 8)
    b_step = ((b_m / tl.load(p_scalars + 6)) / b_low) * tl.load(p_scalars + 10)
    b_p = b_p * tl.load(p_scalars + 9) - b_step
    tl.store(p_p, b_p.to(tl.float32), mask=m_e)
    tl.store(p_m, b_m.to(tl.float32), mask=m_e)
    tl.store(p_v, b_v.to(tl.float32), mask=m_e)
