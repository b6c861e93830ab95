"""Which products make S in their own launch, and of what."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import gemm_beside, launch, project_beside, tables
from fastlora.kernels.columns import Columns
from fastlora.kernels.project_beside import Low
from tests.unit.h200 import CPU, QKV, columns, stand_in

WIDEST = tables.GEMM_SPECIALIZED[-1]


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    yield from stand_in(monkeypatch, gemm_beside.plan)


@pytest.mark.parametrize(
    "tiles, programs", [(1, 1), (128, 128), (132, 132), (133, 67), (1024, 128), (1536, 128), (3584, 128), (1584, 132), (1585, 122)]
)
def test_a_grid_has_no_more_programs_than_share_its_tiles_evenly(tiles, programs):
    assert launch.even_programs(tiles, CPU) == programs
    # as many turns as with every multiprocessor
    assert launch.cdiv(tiles, programs) == launch.cdiv(tiles, 132)


@pytest.mark.parametrize(
    "rank, widths, rows, inner, transposed, found",
    [
        (16, QKV, 8192, 4096, True, 4), (16, QKV, 8192, 4096, False, 4), (16, QKV, 2048, 4096, False, 4),
        # 192 columns of S are too much work, of which 128 are made; of dS each projection reads its own features
        (64, QKV, 8192, 4096, True, 4), (64, QKV, 8192, 4096, False, 4), (128, QKV, 8192, 4096, True, 0), (32, QKV, 8192, 4096, True, 4),
        (64, (4096,), 8192, 4096, True, 4), (128, (4096,), 8192, 4096, True, 0),
        # every multiprocessor has a tile in every turn; two are too few for what is begun together; more turns than it is worth
        (16, (4096,), 8448, 4096, True, 0), (16, (4096,), 8320, 4096, True, 0), (16, (4096,), 7872, 4096, True, 8), (16, (28672,), 8192, 4096, True, 0),
        # features that are no whole blocks
        (16, (1000, 1048), 8192, 4096, False, 0), (16, (4096,), 8192, 4120, True, 0),
        # few tokens take a narrow tile
        (16, (2048,), 512, 2048, True, 0),
    ],
)  # fmt: skip
def test_how_many_programs_make_s(rank, widths, rows, inner, transposed, found):
    layout = columns(rank, *widths)
    deep, outer = (inner, sum(widths)) if transposed else (sum(widths), inner)
    tile = launch.gemm_specialized_tile(rows, outer, 132)
    low = project_beside.low_of(layout, deep, torch.bfloat16, "sm_90", transposed=transposed)
    assert project_beside.helpers(low, rows, outer, tile, CPU, transposed=transposed) == found
    made = gemm_beside.plan(rows, deep, outer, layout, transposed, False, torch.bfloat16, CPU)
    assert (made is None) == (found == 0)
    if found:
        grid, tiles = made.launch.grid[0], launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
        assert made.helpers == found and grid == launch.even_programs(tiles, CPU) + found <= 132


def test_what_s_and_ds_are_made_of():
    layout = columns(16, *QKV)
    assert project_beside.low_of(layout, 4096, torch.bfloat16, "sm_90", transposed=True) == Low(64, 1, (0,), (4096,), 4096)
    # dS of a low rank: sums of as many features as the pass that makes dS and dB together takes, so the bits are its bits
    low = project_beside.low_of(layout, 6144, torch.bfloat16, "sm_90", transposed=False)
    block = tables.token_sum_tile("sm_90", torch.bfloat16, 16, with_ds=True, features=6144).bn
    assert low == Low(16, 4, (0, 4096, 5120), QKV, block)
    assert low.constants() == dict(S0=0, S1=4096, S2=5120, F0=4096, F1=1024, F2=1024, GROUPS=4, C=16, SUM=block)
    # of S all columns, or those of two of three projections
    assert project_beside.low_of(columns(64, *QKV), 4096, torch.bfloat16, "sm_90", transposed=True) == Low(128, 1, (0,), (4096,), 4096)
    assert project_beside.low_of(columns(32, *QKV), 4096, torch.bfloat16, "sm_90", transposed=True) == Low(128, 1, (0,), (4096,), 4096)
    assert project_beside.low_of(columns(128, 4096), 4096, torch.bfloat16, "sm_90", transposed=True) == Low(128, 1, (0,), (4096,), 4096)
    # of a high rank: one sum, as project.py makes it
    assert project_beside.low_of(columns(64, *QKV), 6144, torch.bfloat16, "sm_90", transposed=False) == Low(64, 4, (0, 4096, 5120), QKV, 4096)


def test_the_first_adapter_of_a_group_may_lie_behind_a_layer_without_one():
    # key and value have adapters and query has none; up has one and gate has none
    low = project_beside.low_of(Columns((16, 16), (4096, 5120), (1024, 1024), (2.0, 2.0)), 6144, torch.bfloat16, "sm_90", transposed=False)
    found = low.constants()
    assert [found[name] for name in ("S0", "F0", "S1", "F1", "F2")] == [4096, 1024, 5120, 1024, 0]
    low = project_beside.low_of(Columns((16,), (14336,), (14336,), (2.0,)), 28672, torch.bfloat16, "sm_90", transposed=False)
    assert (low.constants()["S0"], low.constants()["F0"]) == (14336, 14336)


@pytest.fixture
def a_gpu(monkeypatch):
    """Words lie on the host; the current stream is told, and whether a graph is captured."""
    state = {"stream": 1, "capturing": False}
    monkeypatch.setattr(project_beside, "_words", {})
    monkeypatch.setattr(launch, "current_stream", lambda index: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return state


def test_every_stream_has_words_of_its_own_until_there_are_none(a_gpu):
    first = project_beside.words(CPU)
    assert first.dtype == torch.int32 and first.tolist() == [0] * (project_beside.MOST_ROWS + project_beside.MORE)
    assert project_beside.words(CPU) is first
    seen = [first]
    for a_gpu["stream"] in range(2, project_beside.MOST_STREAMS + 1):
        seen.append(project_beside.words(CPU))
    assert len({one.data_ptr() for one in seen}) == project_beside.MOST_STREAMS
    a_gpu["stream"] += 1
    assert project_beside.words(CPU) is None
    a_gpu["stream"] = 1
    assert project_beside.words(CPU) is first


def test_a_graph_that_is_captured_has_no_words(a_gpu):
    assert project_beside.words(CPU) is not None
    a_gpu["capturing"] = True
    assert project_beside.words(CPU) is None
