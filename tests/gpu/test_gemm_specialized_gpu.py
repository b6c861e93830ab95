"""The warp-specialised GEMM has the bits of the portable kernel, at every edge, and compiles nothing for a new length."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_specialized, hopper, launch, tables
from fastlora.kernels.columns import Columns
from fastlora.kernels.gemm import gemm
from tests.gpu_marks import HOPPER

pytestmark = HOPPER

# Tokens, output and input features, rank (0: none): whole tiles, edges, one row, one and two steps of K, ranks of one block and of four.
SHAPES = [
    (1024, 512, 512, 16), (1, 256, 320, 32), (77, 384, 128, 128), (300, 264, 256, 64), (640, 1000, 1024, 0), (129, 4096, 136, 256),
    (8192, 6144, 4096, 64), (4097, 520, 2048, 16), (512, 2048, 8192, 16), (1000, 2048, 576, 32), (130, 8192, 2048, 128),
]  # fmt: skip


def inputs(m, n, k, r, dtype, transposed):
    pen = torch.Generator("cuda").manual_seed(m + n + k + r)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=pen).to(dtype)

    weight = draw(n, k) if transposed else draw(k, n)
    if not r:
        return draw(m, k), weight, None, None, None
    return draw(m, k), weight, draw(m, r), draw(n, r) if transposed else draw(r, n), draw(n) if transposed else None


@pytest.fixture
def used(monkeypatch):
    """The launches of the specialised kernel: whether it ran."""
    seen, run = [], gemm_specialized.run
    monkeypatch.setattr(gemm_specialized, "run", lambda *a, **k: seen.append(run(*a, **k)) or seen[-1])
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_specialised_gemm_has_the_portable_bits(shape, transposed, dtype, used, monkeypatch):
    x, weight, s, b, bias = inputs(*shape, dtype, transposed)
    ours = [gemm(x, weight, s, b, bias, transposed=transposed) for _ in range(3)]
    monkeypatch.setattr(hopper, "compiles", lambda kernel: False)
    theirs = gemm(x, weight, s, b, bias, transposed=transposed)
    assert used == [True] * 3 + [False]
    for one in ours:
        assert torch.equal(one, theirs)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_width_of_the_tile_has_the_same_bits(shape, transposed, monkeypatch):
    x, weight, s, b, bias = inputs(*shape, torch.bfloat16, transposed)
    found = []
    for tile in tables.GEMM_SPECIALIZED:
        monkeypatch.setattr(launch, "gemm_specialized_tile", lambda *of, tile=tile: tile)
        gemm_specialized.plan.cache_clear()
        found.append(gemm(x, weight, s, b, bias, transposed=transposed))
    gemm_specialized.plan.cache_clear()
    assert len(found) == 3
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("tokens", [77, 512, 2048])
@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize("starts", [(0, 1024, 1536), (0, 512), (0, 576, 768)], ids=str)
def test_a_tile_that_takes_its_own_projections_columns_has_the_bits_of_all(starts, rank, tokens, used, monkeypatch):
    ends = (*starts[1:], 2048)
    layout = Columns((rank,) * len(starts), starts, tuple(e - s for s, e in zip(starts, ends)), (1.0,) * len(starts))
    x, weight, s, b, _ = inputs(tokens, 2048, 1024, layout.columns, torch.bfloat16, True)
    for place, (start, end) in enumerate(zip(starts, ends)):
        outside = torch.ones(layout.columns, dtype=torch.bool, device="cuda")
        outside[place * layout.padded : (place + 1) * layout.padded] = False
        b[start:end, outside] = 0
    assert layout.count * layout.padded == layout.columns or not b[:, layout.count * layout.padded :].any()
    forward = gemm(x, weight, s, b, transposed=True, layout=layout)
    _, across, ds, a, _ = inputs(tokens, 1024, 2048, layout.columns, torch.bfloat16, False)
    ds[:, layout.count * layout.padded :] = 0
    dx = gemm(forward, across, ds, a, transposed=False, layout=layout)
    assert used == [True] * 2
    monkeypatch.setattr(hopper, "compiles", lambda kernel: False)
    assert torch.equal(forward, gemm(x, weight, s, b, transposed=True))
    assert torch.equal(dx, gemm(forward, across, ds, a, transposed=False))


def test_specialised_gemm_compiles_a_kernel_a_width_and_nothing_for_a_new_length(used):
    caches = gemm_specialized.gemm_specialized_kernel.device_caches

    def step(tokens):
        x, weight, s, b, _ = inputs(tokens, 512, 576, 16, torch.bfloat16, True)
        gemm(x, weight, s, b, transposed=True)

    for tokens in (256, 4096, 16384):
        step(tokens)
    before = sum(len(cache[0]) for cache in caches.values())
    for tokens in (1, 16, 333, 1024, 8192):
        step(tokens)
    assert sum(len(cache[0]) for cache in caches.values()) == before > 0
    assert used == [True] * 8
