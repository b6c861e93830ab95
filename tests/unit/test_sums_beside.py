"""Which sums over tokens a product makes in its own launch, and in what pieces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import gemm_beside, gemm_sums, project_beside, sums_beside
from fastlora.kernels.chunks import chunks_of
from fastlora.kernels.columns import Columns
from fastlora.kernels.sums_beside import Pieces, Sums
from fastlora.kernels.token_sum import MOST_WALK, Sink
from fastlora.token_sum import TokenSum
from tests.unit.h200 import CPU, QKV, columns, stand_in


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    yield from stand_in(monkeypatch, gemm_beside.plan, gemm_sums.plan)


def pieces(layout: Columns, outer: int, *, with_a: bool, chunks: int = 16, units: int = 128) -> Pieces | None:
    low = project_beside.low_of(layout, sum(layout.widths), torch.bfloat16, "sm_90", transposed=False)
    return sums_beside.pieces_of(layout, outer, low, chunks, units, 132, with_a=with_a)


def test_a_piece_of_da_takes_all_projections_where_their_columns_fit_its_registers():
    assert pieces(columns(16, *QKV), 4096, with_a=True) == Pieces(64, 1, 3, 2, 4)
    assert pieces(columns(64, *QKV), 4096, with_a=True) == Pieces(64, 3, 1, 2, 1)
    assert pieces(columns(32, *QKV), 4096, with_a=True) == Pieces(32, 3, 1, 2, 1)
    assert pieces(columns(64, 4096), 4096, with_a=True) == Pieces(64, 1, 1, 4, 4)
    assert pieces(columns(16, *QKV), 4096, with_a=False) == Pieces(16, 1, 1, 2, 16)


def test_rows_are_cut_at_chunks_and_no_piece_walks_more_than_its_counts_hold():
    assert pieces(columns(16, *QKV), 4096, with_a=True, chunks=1) == Pieces(64, 1, 3, 1, 1)
    found = pieces(columns(16, 14336, 14336), 4096, with_a=True, chunks=4096, units=4096)
    assert found.runs_b >= 4096 / MOST_WALK and found.runs_a >= 4096 / MOST_WALK


@pytest.mark.parametrize("layout, outer", [(columns(16, 4096 + 64), 4096), (columns(16, 4096), 4096 + 64)], ids=["dB", "dA"])
def test_features_that_are_no_whole_pieces_have_kernels_of_their_own(layout, outer):
    assert pieces(layout, outer, with_a=True) is None


@pytest.mark.parametrize("rank, widths, rows, with_a, found", [
    (16, QKV, 8192, True, True), (64, QKV, 8192, True, True), (16, (4096,), 2048, False, True),
    # where dS has a kernel of its own, so have the sums
    (128, (4096,), 8192, True, False), (16, (4096,), 8320, True, False),
])  # fmt: skip
def test_which_products_make_sums(rank, widths, rows, with_a, found):
    made = gemm_sums.plan(rows, sum(widths), 4096, columns(rank, *widths), 16, with_a, torch.bfloat16, CPU)
    assert (made is not None) == found
    if found:
        beside = gemm_beside.plan(rows, sum(widths), 4096, columns(rank, *widths), False, False, torch.bfloat16, CPU)
        assert made.launch.grid == beside.launch.grid and made.helpers == beside.helpers
        assert made.launch.constants["SUMS"] == 1 + with_a
        names = [*gemm_sums.gemm_sums_kernel.arg_names]
        assert tuple(names[: len(gemm_sums.OPERANDS)]) == gemm_sums.OPERANDS and len(made.launch.describe) == len(gemm_sums.OPERANDS)
        assert set(made.launch.constants) < set(names)


def test_chunks_are_counted_once_whether_or_not_the_kernel_compiles(monkeypatch):
    layout, rows = columns(16, 2048), 2048
    dy, weight = torch.zeros(rows, 2048, dtype=torch.bfloat16), torch.zeros(2048, 2048, dtype=torch.bfloat16)
    factor = torch.zeros(2048, 16, dtype=torch.bfloat16)
    total = TokenSum((2048, 16))
    chunks = chunks_of(rows, None, CPU)
    sums = Sums(chunks, torch.zeros(rows, 16, dtype=torch.bfloat16), Sink(total.total, total.stats[None], (total,)))
    monkeypatch.setattr(gemm_sums, "plan", lambda *shape: gemm_sums.Plan(None, 4, Pieces(16, 1, 1, 1, 1)))
    monkeypatch.setattr(project_beside, "words", lambda device: torch.zeros(1, dtype=torch.int32))
    seen = []
    for done, counted in ((False, 0), (True, chunks.count)):
        monkeypatch.setattr(gemm_sums, "attempt", lambda *given, done=done: seen.append(given) or done)
        found = gemm_sums.run(dy, weight, factor, factor.T.contiguous(), layout, sums)
        assert (found is not None) == done and total.chunks == counted
    # the number of the first chunk goes to the kernel
    assert [given[-2:] for given in seen] == [(0, 0), (0, 0)]
