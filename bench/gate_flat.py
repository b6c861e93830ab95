"""How the compile gate builds the kernels that walk memory as it lies: the optimiser's, for integer sums and for ordinary gradients, the
copies of A and B, and dropout's masks as bits."""

from __future__ import annotations

from fastlora.kernels import adamw, factors, masks
from fastlora.kernels.launch import cdiv, padded_rank
from fastlora.kernels.tables import ADAMW_TILE, FACTORS_TILE, mask_tile

OPTIMISER = ("adamw", "squares")
OPERATIONS = (*OPTIMISER, "factors", "masks")
# What a kernel is told that draws dropout's random words.
DRAWS = {"p_token": "*i64"} | dict.fromkeys(("seed0", "seed1", "seed2", "threshold"), "i64")
_POINTERS = {"p_table": "*i64", "p_where": "*i32", "p_scalars": "*fp64", "p_out": "*fp64"}


def build_arguments(case, element: str):
    """(kernel, tile, signature, constants) of a case; of the optimiser's, ``exact``: gradients are integer sums."""
    if case.operation == "factors":
        constants = dict(RANK=case.rank, R=padded_rank(case.rank), K=case.inner, N=case.outer, BLOCK=FACTORS_TILE.bm)
        return factors.factors_kernel, FACTORS_TILE, {"p_a": "*fp32", "p_b": "*fp32", "p_a_out": element, "p_b_out": element}, constants
    if case.operation == "masks":
        tile = mask_tile(case.arch)
        return masks.mask_kernel, tile, {"p_bits": "*u8", "M": "i32"} | DRAWS, dict(BYTES=8 * cdiv(case.inner, masks.BLOCK), BM=tile.bm, BB=tile.bn)
    kernel = getattr(adamw, f"{case.operation}_kernel")
    constants = dict(INTEGER=case.exact, FIELDS=adamw.FIELDS, BLOCK=ADAMW_TILE.bm)
    return kernel, ADAMW_TILE, {k: v for k, v in _POINTERS.items() if k in kernel.arg_names}, constants
