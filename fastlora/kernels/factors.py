"""Copies of A and B as the products read them: in their dtype, with the rank padded by zeros. One launch for both."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch
from fastlora.kernels.tables import FACTORS_TILE


@triton.jit
def factors_kernel(
    p_a, p_b, p_a_out, p_b_out, RANK: tl.constexpr, R: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """p_a [RANK, K] to p_a_out [R, K], p_b [N, RANK] to p_b_out [N, R]; the first programs have A, the others B."""
    i_block = tl.program_id(0)
    in_a: tl.constexpr = (R * K + BLOCK - 1) // BLOCK
    if i_block < in_a:
        o_a = i_block * BLOCK + tl.arange(0, BLOCK)
        b_a = tl.load(p_a + o_a, mask=o_a < RANK * K, other=0.0)
        tl.store(p_a_out + o_a, b_a.to(p_a_out.dtype.element_ty), mask=o_a < R * K)
    else:
        o_b = (i_block - in_a) * BLOCK + tl.arange(0, BLOCK)
        m_b = o_b < N * R
        b_b = tl.load(p_b + (o_b // R) * RANK + o_b % R, mask=m_b & (o_b % R < RANK), other=0.0)
        tl.store(p_b_out + o_b, b_b.to(p_b_out.dtype.element_ty), mask=m_b)


@functools.lru_cache(maxsize=1024)
def _plan(rank, inner, outer, of_a, of_b, dtype, device) -> tuple[launch.Launch, int]:
    """(the launch of one shape, the padded rank); a launch keeps one binary, so the dtypes of a, of b and of the copies are told too."""
    padded, block = launch.padded_rank(rank), FACTORS_TILE.bm
    blocks = launch.cdiv(padded * inner, block) + launch.cdiv(outer * padded, block)
    made = launch.Launch(factors_kernel, (blocks,), FACTORS_TILE, RANK=rank, R=padded, K=inner, N=outer, BLOCK=block)
    return made, padded


def copy_factors(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r], contiguous, of any floating dtypes -> [R, K] and [N, R] in ``dtype``; R the padded rank."""
    (rank, inner), outer = a.shape, b.shape[0]
    made, padded = _plan(rank, inner, outer, a.dtype, b.dtype, dtype, a.device)
    a_out, b_out = launch.empty(a, padded, inner, dtype=dtype), launch.empty(b, outer, padded, dtype=dtype)
    made(a, b, a_out, b_out)
    return a_out, b_out
