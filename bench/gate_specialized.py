"""The compile gate's builds of the warp-specialised GEMM, which is Gluon and for sm_90 alone."""

from __future__ import annotations

import torch

from fastlora.kernels import gemm_specialized as file
from fastlora.kernels import tables

OPERATIONS = ("gemm_specialized",)


def build_arguments(case, element: str):
    """(kernel, tile, signature, constants) as the library launches it; ``element``: pointers to the dtype."""
    n, k = (case.outer, case.inner) if case.transposed else (case.inner, case.outer)
    tile = tables.gemm_tile(case.arch, case.dtype, dropout=False, tma=True, specialized=True)
    name = element.removeprefix("*")
    signature = {
        which: f"tensordesc<{name}[{rows}, {columns}],{file.layout_of(case.dtype, rows, columns)!r}>"
        for which, (rows, columns) in file.blocks_of(tile, transposed=case.transposed).items()
    }
    signature |= {"p_bias": element, "M": "i32"}
    constants = dict(
        N=n, K=k, R=case.rank, TRANSPOSED=case.transposed, BIAS=case.dtype == torch.float16, BM=tile.bm, BN=tile.bn, BK=tile.bk,
        STAGES=tile.stages, GROUP=tile.group, PROGRAMS=132,
    )  # fmt: skip
    return file.gemm_specialized_kernel, tile, signature, constants


def all_cases(make) -> list:
    """Both directions at the ranks of the other kernels, an edge, two steps of K, and fp16 with a bias; ``make`` is the gate's Case."""
    cases = [make("gemm_specialized", "sm_90", rank=rank, transposed=side) for rank in (16, 64, 256) for side in (True, False)]
    return cases + [
        make("gemm_specialized", "sm_90", outer=1000, inner=1160), make("gemm_specialized", "sm_90", rank=64, inner=128),
        make("gemm_specialized", "sm_90", torch.float16),
    ]  # fmt: skip
