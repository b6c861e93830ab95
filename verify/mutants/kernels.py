"""Variant kernels with a fault of order; import where Triton is installed alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from verify.oracle.linear import drop, scale_of
from verify.subject import LinearInputs, LinearResult

CHUNK, COLUMNS = 16, 32


@triton.jit
def _token_sum_by_float_atomics(p_ds, p_x, p_da, M, R, K, CHUNK: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """dA of one chunk of tokens and one tile of columns, added to memory in fp32."""
    o_m = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    o_k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    o_r = tl.arange(0, RANK)
    b_ds = tl.load(p_ds + o_m[:, None] * R + o_r[None, :], mask=(o_m[:, None] < M) & (o_r[None, :] < R), other=0.0)
    b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=(o_m[:, None] < M) & (o_k[None, :] < K), other=0.0)
    b_da = tl.sum(b_ds[:, :, None] * b_x[:, None, :], axis=0)
    tl.atomic_add(p_da + o_r[:, None] * K + o_k[None, :], b_da, mask=(o_r[:, None] < R) & (o_k[None, :] < K))


def float_atomics(inputs: LinearInputs, result: LinearResult, divisor: float) -> torch.Tensor:
    """dA [r, K] fp32, summed over tokens by floating-point atomics in the order in which programs run."""
    (m, k), r = inputs.x.shape, inputs.rank
    scale = scale_of(inputs.alpha, r, inputs.rslora)
    keep = None if result.keep is None else result.keep.to(inputs.x.device)
    ds = (scale * (inputs.dy.double() @ inputs.b.double())).float().contiguous()
    x = drop(inputs.x, keep, inputs.dropout).float().contiguous()
    da = torch.zeros(r, k, device=x.device)
    if m:
        grid = (triton.cdiv(m, CHUNK), triton.cdiv(k, COLUMNS))
        rank = triton.next_power_of_2(r)
        _token_sum_by_float_atomics[grid](ds, x, da, m, r, k, CHUNK=CHUNK, RANK=rank, COLUMNS=COLUMNS)
    return da / divisor
