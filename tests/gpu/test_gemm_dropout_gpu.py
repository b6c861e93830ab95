"""The warp-specialised product with dropout in its epilogue has the bits of the portable kernel, at every edge."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_dropout, hopper, launch, project_beside
from fastlora.kernels.columns import Columns
from fastlora.kernels.gemm import gemm
from fastlora.kernels.project import project
from fastlora.ops.dropout import keep_scale, threshold
from tests.gpu.test_gemm_beside_gpu import QKV, inputs
from tests.gpu_marks import HOPPER

pytestmark = HOPPER

# Tokens, output features of each projection, input features, rank, whether the ring has places for all rank columns.
SHAPES = [
    (8192, (4096, 1024, 1024), 4096, 16, True), (8192, (4096,), 4096, 64, True), (4097, (2048, 2048), 2048, 32, True),
    (5000, (4096, 1024, 1024), 2048, 64, True), (3001, (2048,), 4104, 128, True), (8191, (1000,), 2048, 5, True),
    (2049, (2048, 2048), 4096, 128, True), (2049, (4096, 1024, 1024), 4096, 128, False), (4096, (2048,), 4096, 256, True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_in_the_epilogue_has_the_portable_bits(shape, dtype, monkeypatch):
    rows, widths, inner, rank, served = shape
    pen, outer = torch.Generator("cuda").manual_seed(rows + inner + rank), sum(widths)

    def draw(*size):
        return torch.randn(*size, device="cuda", generator=pen).to(dtype)

    starts = tuple(sum(widths[:i]) for i in range(len(widths)))
    layout = Columns((rank,) * len(widths), starts, widths, (1.0,) * len(widths))
    dy, weight, ds, a = draw(rows, outer), draw(outer, inner), draw(rows, layout.columns), draw(layout.columns, inner)
    tokens = torch.randint(-(2**62), 2**62, (rows,), device="cuda", generator=pen)
    drop = launch.Dropout(threshold(0.1), keep_scale(0.1), tuple(2**61 + 7 * i for i in range(len(widths))), tokens)
    seen, run = [], gemm_dropout.run
    monkeypatch.setattr(gemm_dropout, "run", lambda *of: seen.append(run(*of)) or seen[-1])
    found = [gemm(dy, weight, ds, a, transposed=False, dropout=drop, layout=layout) for _ in range(3)]
    monkeypatch.setattr(hopper, "compiles", lambda kernel: False)
    plain = gemm(dy, weight, ds, a, transposed=False, dropout=drop, layout=layout)
    assert seen == [served] * 3 + [False]
    for one in found:
        assert torch.equal(one, plain)
    # without dropout it is another matrix
    assert not torch.equal(plain, gemm(dy, weight, ds, a, transposed=False, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8192, 4096, QKV, 16), (8192, 4096, QKV, 64), (2048, 4096, (4096,), 5), (7872, 4096, (14336, 14336), 16)], ids=str)
def test_ds_in_its_launch_has_the_bits_of_a_kernel_of_its_own(shape, dtype):
    x, dy, weight, a, b, layout = inputs((*shape, None), dtype)
    pen = torch.Generator("cuda").manual_seed(7)
    tokens = torch.randint(-(2**62), 2**62, (len(dy),), device="cuda", generator=pen)
    drop = launch.Dropout(threshold(0.1), keep_scale(0.1), tuple(2**61 + 7 * i for i in range(layout.count)), tokens)
    ds = project(dy, b, layout, transposed=True)
    dx = gemm(dy, weight, ds, a, transposed=False, dropout=drop, layout=layout)
    for _ in range(5):
        found = gemm_dropout.run_with_low(dy, weight, b, a, drop, layout)
        assert torch.equal(found[0], dx) and torch.equal(found[1], ds)
    assert not project_beside.words(x.device).any()
