"""S in the product's own launch has the bits of a kernel of its own, run after run, and sums beside a product those of sums after it."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_beside, project_beside
from fastlora.kernels.chunks import chunks_of
from fastlora.kernels.columns import Columns
from fastlora.kernels.gemm import gemm
from fastlora.kernels.project import project
from fastlora.ops import beside, triton_path
from fastlora.ops.triton_path import low_rank_gradients
from tests import split_cases as cases
from tests.gpu_marks import HOPPER
from tests.models import tiny_model

pytestmark = HOPPER

QKV = (4096, 1024, 1024)
# Tokens, input features, output features of each projection, rank, which directions make S in their launch (forward, backward).
SHAPES = [
    (8192, 4096, QKV, 16, (True, True)), (8192, 4096, QKV, 64, (True, True)), (8192, 4096, QKV, 5, (True, True)),
    (2048, 4096, (4096,), 16, (True, True)), (8111, 4096, (4096,), 64, (True, True)), (7872, 4096, QKV, 32, (True, True)), (7872, 4096, QKV, 40, (True, True)),
    (8192, 4096, (14336, 14336), 16, (False, True)), (8192, 14336, (4096,), 16, (True, False)), (8320, 4096, (4096,), 16, (False, False)),
]  # fmt: skip


def draw(pen, dtype, *shape, scale=1.0):
    return (torch.randn(*shape, device="cuda", generator=pen) * scale).to(dtype)


def inputs(shape, dtype):
    """(x, dy, weight, a, b, layout) with a block-diagonal b."""
    rows, inner, widths, rank, _ = shape
    pen, outer = torch.Generator("cuda").manual_seed(rows + sum(widths) + rank), sum(widths)
    starts = tuple(sum(widths[:i]) for i in range(len(widths)))
    layout = Columns((rank,) * len(widths), starts, widths, (2.0, 0.5, 1.0)[: len(widths)])
    x, dy, weight = draw(pen, dtype, rows, inner), draw(pen, dtype, rows, outer), draw(pen, dtype, outer, inner, scale=inner**-0.5)
    a = torch.zeros(layout.columns, inner, dtype=dtype, device="cuda")
    b = torch.zeros(outer, layout.columns, dtype=dtype, device="cuda")
    for place, (start, width) in enumerate(layout.ranges):
        mine = slice(place * layout.padded, place * layout.padded + rank)
        a[mine] = draw(pen, dtype, rank, inner, scale=inner**-0.5)
        b[start : start + width, mine] = draw(pen, dtype, width, rank, scale=0.1)
    return x, dy, weight, a, b, layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_s_in_the_products_launch_has_the_bits_of_a_kernel_of_its_own(shape, dtype):
    x, dy, weight, a, b, layout = inputs(shape, dtype)
    s = project(x, a, layout)
    y = gemm(x, weight, s, b, transposed=True, layout=layout)
    _, ds = low_rank_gradients(dy, s, b, layout, chunks_of(len(dy), None, dy.device), None)
    dx = gemm(dy, weight, ds, a, transposed=False, layout=layout)
    for _ in range(10):  # who comes first changes from run to run
        forward = gemm_beside.run(x, weight, a, b, None, transposed=True, layout=layout)
        backward = gemm_beside.run(dy, weight, b, a, None, transposed=False, layout=layout)
        assert (forward is not None, backward is not None) == shape[-1]
        for found, expected in ((forward, (y, s)), (backward, (dx, ds))):
            if found is not None:
                assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not project_beside.words(x.device).any()  # as they were, for the next launch


@pytest.mark.parametrize("starts, widths", [((4096, 5120), (1024, 1024)), ((5120,), (1024,)), ((0, 5120), (4096, 1024))], ids=str)
def test_layers_without_an_adapter_among_those_of_a_group(starts, widths):
    pen = torch.Generator("cuda").manual_seed(starts[0])
    layout = Columns((16,) * len(starts), starts, widths, (2.0,) * len(starts))
    dy, weight = draw(pen, torch.bfloat16, 8192, 6144), draw(pen, torch.bfloat16, 6144, 4096, scale=6144**-0.5)
    a, b = draw(pen, torch.bfloat16, layout.columns, 4096), torch.zeros(6144, layout.columns, dtype=torch.bfloat16, device="cuda")
    for place, (start, width) in enumerate(layout.ranges):
        b[start : start + width, place * 16 : place * 16 + 16] = draw(pen, torch.bfloat16, width, 16, scale=0.1)
    s = torch.zeros(8192, layout.columns, dtype=torch.bfloat16, device="cuda")
    _, ds = low_rank_gradients(dy, s, b, layout, chunks_of(len(dy), None, dy.device), None)
    found = gemm_beside.run(dy, weight, b, a, None, transposed=False, layout=layout)
    assert ds[:, : 16 * len(starts)].any(0).all()
    assert torch.equal(found[1], ds) and torch.equal(found[0], gemm(dy, weight, ds, a, transposed=False, layout=layout))


def test_launches_on_several_streams_do_not_disturb_each_other():
    x, _, weight, a, b, layout = inputs(SHAPES[3], torch.bfloat16)
    expected = gemm_beside.run(x, weight, a, b, None, transposed=True, layout=layout)
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 3]):
            found.append(gemm_beside.run(x, weight, a, b, None, transposed=True, layout=layout))
    torch.cuda.synchronize()
    for y, s in found:
        assert torch.equal(y, expected[0]) and torch.equal(s, expected[1])


def test_a_captured_graph_takes_kernels_apart_and_has_their_bits():
    x, _, weight, a, b, layout = inputs(SHAPES[3], torch.bfloat16)
    assert gemm_beside.run(x, weight, a, b, None, transposed=True, layout=layout) is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # two graphs may run at once, and a launch's words are its stream's
        found = gemm_beside.run(x, weight, a, b, None, transposed=True, layout=layout)
    assert found is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("exactly", [True, False])
def test_a_models_training_does_not_depend_on_what_runs_beside_what(monkeypatch, exactly, dropout):
    rows, found, ways = cases.random_rows([300 + 23 * i for i in range(2 * cases.ROWS)], 96), [], []
    for large in (1, 2**60):
        seen, run = [], gemm_beside.run
        with monkeypatch.context() as patch:
            patch.setattr(beside, "LARGE", large)
            patch.setattr(triton_path, "gemm_with_low", lambda *a, run=run, seen=seen, **k: seen.append(run(*a, **k)) or seen[-1])
            model = tiny_model("llama", hidden_size=4096, intermediate_size=4096, max_position_embeddings=2048).to("cuda", torch.bfloat16)
            subject = cases.Subject(model, r=8, lora_dropout=dropout)
            found.append(subject.train(rows, cases.FEW[0], steps=2, exactly=exactly))
        ways.append(any(made is not None for made in seen))
    assert ways == [dropout == 0.0] * 2
    assert found[0].digest == found[1].digest and found[0].losses == found[1].losses
