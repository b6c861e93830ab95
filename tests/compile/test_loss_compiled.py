"""The loss kernel compiled with no GPU, with and without what it may be asked for: Gemma's soft-cap once did not compile."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import compile_gate
from fastlora.kernels import tables
from fastlora.kernels.cross_entropy import cross_entropy_kernel
from fastlora.kernels.row_tables import cross_entropy_tile

POINTERS = {"p_logits": "*bf16", "p_labels": "*i64", "p_loss": "*fp32"}
NUMBERS = dict.fromkeys(("scale", "softcap", "smoothing", "z_loss"), "fp32")


@pytest.mark.parametrize("softcap", [False, True], ids=("plain", "softcap"))
@pytest.mark.parametrize("terms", [False, True], ids=("", "terms"))
def test_loss_kernel_compiles_and_does_not_spill(softcap, terms):
    names = cross_entropy_kernel.arg_names
    tile = cross_entropy_tile("sm_90")
    constants = {"V": 128256, "SOFTCAP": softcap, "SMOOTH": terms, "ZLOSS": terms, "GRADIENT": True, "BV": tile.bn, "EACH": tile.bk}
    kinds = {**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        cross_entropy_kernel, {name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = compile_gate._report(compiled, "sm_90")
    assert report.spills == 0
    assert report.shared <= tables.SHARED_MEMORY["sm_90"]
