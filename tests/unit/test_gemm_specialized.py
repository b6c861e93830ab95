"""Where the installed Triton does not compile the warp-specialised GEMM: said once, and the portable kernel takes over."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.compiler.errors import CompilationError

from fastlora.kernels import gemm_specialized, launch, tables

if gemm_specialized.MISSING is not None:
    pytest.skip(f"this Triton has no Gluon: {gemm_specialized.MISSING}", allow_module_level=True)

TILE = tables.gemm_tile("sm_90", torch.bfloat16, dropout=False, tma=True, specialized=True)


@pytest.fixture
def call(monkeypatch):
    """run() on tensors of the host, whose launch does what is asked."""
    monkeypatch.setattr(gemm_specialized, "_refused", {})
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((32, 128), (64, 128), (32, 64)))

    def run(launched):
        monkeypatch.setattr(launch, "run", launched)
        return gemm_specialized.run(x, weight, None, None, None, out, TILE, transposed=True)

    return run


def test_a_kernel_that_does_not_compile_is_said_once_and_not_tried_again(call):
    def broken(*arguments, **constants):
        raise CompilationError("async_load", None, "no such thing")

    assert gemm_specialized.usable("sm_90") and not gemm_specialized.usable("sm_100")
    with pytest.warns(UserWarning, match="does not compile with this Triton.*the portable kernel runs"):
        assert call(broken) is False
    assert not gemm_specialized.usable("sm_90")


def test_a_failed_pass_of_the_compiler_counts_as_not_compiling(call):
    def broken(*arguments, **constants):
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="PassManager"):
        assert call(broken) is False


def test_any_other_error_of_a_launch_is_not_swallowed(call):
    def broken(*arguments, **constants):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(broken)
    assert gemm_specialized.usable("sm_90")


def test_blocks_are_what_the_kernel_was_written_for(call):
    seen = {}

    def launched(kernel, grid, tile, *arguments, **constants):
        seen.update(
            kernel=kernel,
            grid=grid,
            blocks=[list(a.block_shape) for a in arguments if hasattr(a, "block_shape")],
            **constants,
        )

    assert call(launched) is True
    assert seen["kernel"] is gemm_specialized.gemm_specialized_kernel and seen["grid"] == (1,)
    assert seen["blocks"] == [[64, 64], [256, 64], [64, 64], [256, 64], [64, 64]]
    assert (seen["N"], seen["K"], seen["R"], seen["STAGES"], seen["BIAS"]) == (64, 128, 0, 4, False)
