"""Which products have dropout in the epilogue of the warp-specialised kernel, and what it is given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import gemm_dropout, launch, masks, tables
from fastlora.kernels.gemm import gemm, gemm_tma_kernel
from tests.unit.h200 import CPU, QKV, columns, dropout, launches_without, stand_in

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    yield from stand_in(monkeypatch, gemm_dropout.plan)


@pytest.mark.parametrize(
    "count, padded, expected", [(1, 16, (1, 16)), (3, 16, (1, 16)), (3, 64, (1, 64)), (2, 128, (2, 64)), (1, 256, (4, 64)), (3, 128, None), (2, 256, None)]
)
def test_rank_columns_of_each_projection_begin_a_place_of_the_ring(count, padded, expected):
    assert gemm_dropout.places_of(count, padded, tables.GEMM_SPECIALIZED[-1]) == expected


@pytest.mark.parametrize(
    "rows, inner, outer, padded, count, served",
    [
        (8192, 6144, 4096, 16, 3, True), (8192, 6144, 4096, 128, 3, False), (128, 4096, 4096, 16, 1, False), (8192, 6144, 4100, 16, 3, False),
        (8192, 64, 4096, 16, 1, False),
    ],
)  # fmt: skip
def test_which_products_it_serves(rows, inner, outer, padded, count, served):
    layout = columns(padded, *[inner // count] * count)
    made = gemm_dropout.plan(rows, inner, outer, layout, False, HALF, CPU)
    assert (made is not None) is served
    if served:
        assert made.launch.grid[0] == launch.even_programs(64 * 16, CPU) == 128 and made.helpers == 0


def test_ds_is_made_in_its_launch_as_one_sum_at_every_rank():
    layout = columns(16, *QKV)
    made, helpers = gemm_dropout.plan(8192, 6144, 4096, layout, True, HALF, CPU)
    assert helpers == 4 and made.grid[0] == 132 and made.constants["BESIDE"] and made.constants["SUM"] == 4096
    assert tuple(name for name in made.kernel.arg_names[:6]) == gemm_dropout.OPERANDS and len(made.describe) == 6
    # every multiprocessor has a tile in every turn
    assert gemm_dropout.plan(8448, 6144, 4096, layout, True, HALF, CPU) is None


@pytest.mark.parametrize("transposed", [True, False])
def test_the_backward_takes_it_and_the_forward_does_not(monkeypatch, transposed):
    seen = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *arguments: seen.append((self, arguments)))
    layout = columns(16, 1024, 1024)
    dy, s = torch.zeros(4096, 2048, dtype=HALF), torch.zeros(4096, layout.columns, dtype=HALF)
    weight, a = torch.zeros(2048, 2048, dtype=HALF), torch.zeros(layout.columns, 2048, dtype=HALF)
    gemm(dy, weight, s, a.t().contiguous() if transposed else a, transposed=transposed, dropout=dropout(4096, 2), layout=layout)
    made, arguments = seen[-1]
    assert [one.kernel for one, _ in seen[:-1]] == ([] if transposed else [masks.mask_kernel])
    assert (made.kernel is gemm_dropout.gemm_dropout_kernel) is not transposed
    if not transposed:
        blocks = [list(one.block_shape) for one in made._described(arguments) if hasattr(one, "block_shape")]
        assert blocks == [[64, 64], [64, 256], [64, 64], [64, 256], [64, 64]]
        assert (made.constants["PLACES"], made.constants["DEPTH"]) == (1, 16)
        # the masks of both, a bit a feature; then rows, scale, projections, programs of dS
        assert arguments[9].shape == (2, 4096, 2048 // 32) and arguments[10:] == (4096, 1.1, 2, 0)
        # a seed a projection and one for none, the threshold in the upper half of a word
        assert seen[0][1][2:] == (4096, 5, 6, 0, 6554 << 16)


def test_a_kernel_that_does_not_compile_leaves_the_product_to_the_portable_one(monkeypatch):
    kernels = launches_without(monkeypatch, gemm_dropout.gemm_dropout_kernel)
    layout = columns(16, 2048)
    dy, ds = torch.zeros(4096, 2048, dtype=HALF), torch.zeros(4096, 16, dtype=HALF)
    weight, a = torch.zeros(2048, 2048, dtype=HALF), torch.zeros(16, 2048, dtype=HALF)
    with pytest.warns(UserWarning, match="GEMM with dropout does not compile"):
        gemm(dy, weight, ds, a, transposed=False, dropout=dropout(4096, 1), layout=layout)
    gemm(dy, weight, ds, a, transposed=False, dropout=dropout(4096, 1), layout=layout)
    assert kernels == [masks.mask_kernel, gemm_dropout.gemm_dropout_kernel, gemm_tma_kernel, gemm_tma_kernel]
