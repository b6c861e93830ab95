"""The warp-specialised GEMM has the bits of the portable kernel, at every edge, and compiles nothing for a new length."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_specialized, hopper
from fastlora.kernels.gemm import gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]

# Tokens, output and input features, rank (0: none): whole tiles, edges, one row, one and two steps of K, ranks of one block and of four.
SHAPES = [
    (1024, 512, 512, 16), (1, 256, 320, 32), (77, 384, 128, 128), (300, 264, 256, 64), (640, 1000, 1024, 0), (129, 4096, 136, 256),
    (8192, 6144, 4096, 64), (4097, 520, 2048, 16),
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
    """The launches of the specialised kernel."""
    seen, run = [], gemm_specialized.run
    monkeypatch.setattr(gemm_specialized, "run", lambda *a, **k: seen.append(run(*a, **k)) or seen[-1])
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_specialised_gemm_has_the_portable_bits(shape, transposed, dtype, used, monkeypatch):
    x, weight, s, b, bias = inputs(*shape, dtype, transposed)
    ours = [gemm(x, weight, s, b, bias, transposed=transposed) for _ in range(3)]
    assert used == [True] * 3
    monkeypatch.setattr(hopper, "usable", lambda arch, kernel: False)
    theirs = gemm(x, weight, s, b, bias, transposed=transposed)
    assert len(used) == 3
    for one in ours:
        assert torch.equal(one, theirs)


def test_specialised_gemm_compiles_nothing_for_a_new_length(used):
    caches = gemm_specialized.gemm_specialized_kernel.device_caches

    def step(tokens):
        x, weight, s, b, _ = inputs(tokens, 512, 576, 16, torch.bfloat16, True)
        gemm(x, weight, s, b, transposed=True)

    step(256)
    before = sum(len(cache[0]) for cache in caches.values())
    for tokens in (1, 16, 333, 1024, 8192):
        step(tokens)
    assert sum(len(cache[0]) for cache in caches.values()) == before > 0
    assert used == [True] * 6
