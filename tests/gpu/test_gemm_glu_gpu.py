"""The gate in the epilogue of the products around it has the bits of three kernels, at every edge, and a layer the bits of either way."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_glu, hopper, launch
from fastlora.kernels.columns import Columns
from fastlora.kernels.gemm import gemm
from fastlora.kernels.glu import glu_backward, glu_forward
from fastlora.ops.dropout import keep_scale, threshold
from tests import split_cases as cases
from tests.gpu_marks import HOPPER
from tests.models import tiny_model

pytestmark = HOPPER

# Tokens, input features, features of the gate, rank (0: none), projections with an adapter, activation: whole tiles, edges of the rows,
# two steps of K, ranks of one block and of more, one adapter of two.
SHAPES = [
    (8192, 4096, 14336, 16, 2, "silu"), (4097, 512, 2048, 64, 1, "gelu_tanh"), (3000, 128, 2304, 32, 2, "gelu"),
    (2049, 1024, 3072, 0, 2, "silu"), (3333, 1024, 3072, 8, 1, "silu"), (6001, 576, 1536, 128, 1, "gelu_tanh"),
]  # fmt: skip


def draw(pen, dtype, *shape, scale=1.0):
    return (torch.randn(*shape, device="cuda", generator=pen) * scale).to(dtype)


def both_sides(shape, dtype):
    """(arguments of the forward, of the backward without gate and up), without adapters at rank 0."""
    rows, inner, features, rank, count, _ = shape
    pen = torch.Generator("cuda").manual_seed(sum(shape[:5]))
    x, weight = draw(pen, dtype, rows, inner), draw(pen, dtype, 2 * features, inner, scale=inner**-0.5)
    dz, down = draw(pen, dtype, rows, inner), draw(pen, dtype, inner, features, scale=inner**-0.5)
    if not rank:
        return (x, weight, None, None, None), (dz, down, None, None, None)
    layout = Columns((rank,) * count, tuple(i * features for i in range(count)), (features,) * count, (1.0,) * count)
    s, b = draw(pen, dtype, rows, layout.columns), draw(pen, dtype, 2 * features, layout.columns, scale=0.1)
    of_row = torch.arange(2 * features, device="cuda") // features
    of_column = torch.arange(layout.columns, device="cuda") // layout.padded
    b *= of_row[:, None] == of_column[None, :]
    single = Columns((rank,), (0,), (inner,), (1.0,))
    ds, a = draw(pen, dtype, rows, single.columns), draw(pen, dtype, single.columns, features, scale=0.1)
    return (x, weight, s, b, layout), (dz, down, ds, a, single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gate_in_the_epilogue_has_the_bits_of_a_kernel_of_its_own(shape, dtype):
    (x, weight, s, b, layout), (dz, down, ds, a, single) = both_sides(shape, dtype)
    activation = shape[-1]
    both = gemm(x, weight, s, b, transposed=True, layout=layout)
    hidden = glu_forward(both, activation)
    dboth, again = glu_backward(gemm(dz, down, ds, a, transposed=False, layout=single), both, activation, emit=True)
    assert torch.equal(again, hidden)
    for _ in range(3):
        found = gemm_glu.forward(x, weight, s, b, layout, activation)
        assert torch.equal(found[0], both) and torch.equal(found[1], hidden)
        found = gemm_glu.backward(dz, down, ds, a, single, activation, both)
        assert torch.equal(found[0], dboth) and torch.equal(found[1], hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3]], ids=str)
def test_the_gate_behind_dropout_in_the_epilogue_has_the_bits_of_kernels_of_their_own(shape, dtype, monkeypatch):
    (x, weight, s, b, layout), (dz, down, ds, a, single) = both_sides(shape, dtype)
    both, tokens = gemm(x, weight, s, b, transposed=True, layout=layout), torch.randint(2**62, (len(x),), device="cuda")
    drop = launch.Dropout(threshold(0.1), keep_scale(0.1), (2**61 + 3,), tokens)
    found = [gemm_glu.backward(dz, down, ds, a, single, shape[-1], both, drop) for _ in range(3)]
    monkeypatch.setattr(hopper, "compiles", lambda kernel: False)
    dboth, hidden = glu_backward(gemm(dz, down, ds, a, transposed=False, layout=single, dropout=drop), both, shape[-1], emit=True)
    for one in found:
        assert torch.equal(one[0], dboth) and torch.equal(one[1], hidden)


def test_a_fused_model_has_the_same_digest_with_the_gate_by_itself(monkeypatch):
    # wide enough for whole tiles: the gate is in the epilogue of one run and by itself in the other
    rows, ways, digests = cases.random_rows([300 + 23 * i for i in range(2 * cases.ROWS)], 96), [], []
    for ours in (True, False):
        seen, plan = [], gemm_glu.plan
        with monkeypatch.context() as patch:
            patch.setattr(gemm_glu, "plan", lambda *of, plan=plan, seen=seen: seen.append(plan(*of)) or seen[-1])
            if not ours:
                patch.setattr(hopper, "compiles", lambda kernel: kernel != gemm_glu.NAME)
            model = tiny_model("llama", hidden_size=512, intermediate_size=8192, max_position_embeddings=2048).to("cuda", torch.bfloat16)
            digests.append(cases.check(cases.Subject(model, r=8), rows, cases.FEW[:2], steps=2).digest)
        ways.append(any(made is not None for made in seen))
    assert ways == [True, False]
    assert digests[0] == digests[1]
