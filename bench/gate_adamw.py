"""How the compile gate builds the optimiser's kernels, for integer sums and for ordinary gradients."""

from __future__ import annotations

from fastlora.kernels import adamw
from fastlora.kernels.tables import ADAMW_TILE

OPERATIONS = ("adamw", "squares")
_POINTERS = {"p_table": "*i64", "p_where": "*i32", "p_scalars": "*fp64", "p_out": "*fp64"}


def build_arguments(case):
    """(kernel, tile, signature, constants) of a case of the optimiser; ``exact``: gradients are integer sums."""
    kernel = getattr(adamw, f"{case.operation}_kernel")
    constants = dict(INTEGER=case.exact, FIELDS=adamw.FIELDS, BLOCK=ADAMW_TILE.bm)
    return kernel, ADAMW_TILE, {k: v for k, v in _POINTERS.items() if k in kernel.arg_names}, constants
