"""S with dropout, masked by warpgroups of their own, has the bits of the portable kernel, at every edge."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import hopper, launch, project_dropout
from fastlora.kernels.columns import Columns
from fastlora.kernels.project import project
from fastlora.ops.dropout import keep_scale, threshold
from tests.gpu_marks import HOPPER

pytestmark = HOPPER

# Tokens, features, projections, rank, whether it is served.
SHAPES = [
    (8192, 4096, 3, 16, True), (8192, 14336, 1, 16, True), (4097, 4096, 2, 64, True), (3001, 576, 3, 64, True), (2049, 1160, 1, 128, True),
    (63, 4096, 3, 5, True), (1000, 2048, 2, 128, False), (1, 128, 1, 32, True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_s_under_dropout_has_the_portable_bits(shape, dtype, monkeypatch):
    rows, features, count, rank, served = shape
    pen = torch.Generator("cuda").manual_seed(rows + features + rank)
    layout = Columns((rank,) * count, tuple(1024 * i for i in range(count)), (1024,) * count, (2.0, 0.5, 1.5)[:count])
    x = torch.randn(rows, features, device="cuda", generator=pen).to(dtype)
    a = torch.zeros(layout.columns, features, device="cuda", dtype=dtype)
    for i in range(count):
        a[i * layout.padded : i * layout.padded + rank] = torch.randn(rank, features, device="cuda", generator=pen) * features**-0.5
    tokens = torch.randint(-(2**62), 2**62, (rows,), device="cuda", generator=pen)
    drop = launch.Dropout(threshold(0.1), keep_scale(0.1), tuple(2**61 + 7 * i for i in range(count)), tokens)
    seen, run = [], project_dropout.run
    monkeypatch.setattr(project_dropout, "run", lambda *of: seen.append(run(*of)) or seen[-1])
    found = [project(x, a, layout, drop) for _ in range(3)]
    monkeypatch.setattr(hopper, "compiles", lambda kernel: False)
    plain = project(x, a, layout, drop)
    assert seen == [served] * 3 + [False]
    for one in found:
        assert torch.equal(one, plain)
    # without dropout it is another matrix
    assert not torch.equal(plain, project(x, a, layout))
