"""The row-wise kernels on a GPU: against float64, and rows whose bits depend on neither place nor number."""

from __future__ import annotations

import pytest
import torch

from fastlora.invariant import make_invariant
from fastlora.kernels.glu import glu_pair_backward, glu_pair_forward
from fastlora.kernels.rms_norm import norm_backward, norm_forward
from fastlora.ops.glu import ACTIVATIONS, glu
from fastlora.ops.rms_norm import STYLES, rms_norm
from tests import row_cases as cases
from tests.models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DTYPES = pytest.mark.parametrize("dtype", list(cases.UNIT), ids=lambda d: str(d)[6:])
OPERATIONS = ("norm", "norm_backward", "norm_narrow", "norm_columns", "rope", "head_norm", "glu")


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (130, 576), (33, 4096), (9, 16384), (3, 20000)])
def test_norm_matches_float64(rows, width, style, dtype):
    dx, h, other, weight = cases.draw(dtype, "cuda", *3 * [(rows, width)], (width,))
    for scale, exact in ((None, h), (1.0, h + other), (0.22, h + other * 0.22)):
        x, rstd, total = norm_forward(h, weight, cases.EPS, style, add=None if scale is None else other, scale=scale or 1.0)
        # fp32: the compiler may fuse the product and the sum, one rounding instead of two
        fused = scale == 0.22 and dtype == torch.float32
        sums = torch.maximum(exact.abs(), other.abs()).double() * 2.0**-23
        assert cases.fits(total, (exact.double(), sums), dtype) if fused else torch.equal(total, exact)
        truth = cases.norm_truth(total, weight, style)
        assert cases.fits(x, truth[0], dtype) and cases.fits(rstd, truth[1], torch.float32)
        for residual in (None, other):
            dh, again = norm_backward(dx, total, rstd, weight, style, residual=residual, emit=True)
            assert cases.fits(dh, cases.norm_backward_truth(dx, total, weight, style, residual), dtype)
            assert torch.equal(again, x)


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("widths", [(2048, 2048), (5120, 1024), (16384, 64)], ids=str)
def test_norm_of_columns_matches_float64_and_touches_nothing_else(widths, style, dtype):
    assert cases.norm_columns_failures(67, widths, style, dtype, "cuda") == []


# heads, head width, features that turn, columns beyond the heads, rows
HEADS = [(40, 128, 128, 1024, 100), (12, 64, 64, 192, 130), (5, 80, 80, 80, 9), (3, 96, 48, 7, 33), (8, 256, 256, 0, 5), (1, 10, 6, 0, 1)]


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_rotate_matches_float64_and_touches_nothing_else(case, inverse, dtype):
    *sizes, rows = case
    cos, sin = cases.angles(rows, case[2], dtype, "cuda")
    assert cases.rotate_failures(sizes, cos, sin, inverse, dtype, "cuda") == []


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("turning", [True, False])
@pytest.mark.parametrize("case", HEADS[:5], ids=str)
def test_head_norm_rotate_matches_float64(case, turning, style, dtype):
    *sizes, rows = case
    cos, sin = cases.angles(rows, case[2], torch.float32, "cuda") if turning else (None, None)
    assert cases.head_norm_failures(sizes, rows, cos, sin, style, dtype, "cuda") == []


@DTYPES
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (130, 1536), (33, 14336), (7, 1001)])
def test_glu_matches_float64(rows, width, activation, dtype):
    assert cases.glu_failures(rows, width, activation, dtype, "cuda") == []


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_glu_is_finite_for_large_gates(activation):
    gate = torch.tensor([[-1e18, -3e4, -200.0, 0.0, 200.0, 3e4, 1e18]], device="cuda")
    up = torch.ones_like(gate)
    hidden = glu_pair_forward(gate, up, activation)
    dgate, _ = glu_pair_backward(up, gate, up, activation)
    assert torch.equal(hidden + 0.0, gate.clamp(min=0.0))
    assert torch.equal(dgate + 0.0, (gate > 0) + 0.5 * (gate == 0))


@DTYPES
@pytest.mark.parametrize(("width", "head"), [(4096, 128), (576, 64)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_do_not_depend_on_place_or_number(name, width, head, dtype):
    shapes, function = cases.row_operations(width, head, dtype, "cuda")[name]
    inputs = cases.draw(dtype, "cuda", *((8192, *shape) for shape in shapes))
    together = function(*inputs)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(8192, generator=generator).cuda()
    for chosen in (slice(0, 128), slice(1000, 1128), slice(8191, 8192), slice(3, 2503), shuffled[:128], shuffled):
        for one, many in zip(function(*(x[chosen] for x in inputs)), together):
            assert torch.equal(one, many[chosen])
    for _ in range(3):
        assert all(torch.equal(one, many) for one, many in zip(function(*inputs), together))


@pytest.mark.parametrize("style", STYLES)
def test_rms_norm_by_kernel_matches_float64(style):
    x, weight, dy = cases.draw(torch.bfloat16, "cuda", (2, 150, 576), (576,), (2, 150, 576))
    leaf = x.clone().requires_grad_()
    y = rms_norm(leaf, weight, cases.EPS, style)
    y.backward(dy)
    assert cases.fits(y.detach(), cases.norm_truth(x, weight, style)[0], x.dtype)
    assert cases.fits(leaf.grad, cases.norm_backward_truth(dy, x, weight, style), x.dtype)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_glu_by_kernel_matches_float64(activation):
    gate, up, dh = cases.draw(torch.bfloat16, "cuda", *3 * [(2, 150, 1536)])
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    hidden = glu(*leaves, activation)
    hidden.backward(dh)
    for ours, pair in zip((hidden.detach(), leaves[0].grad, leaves[1].grad), cases.glu_truth(dh, gate, up, activation)):
        assert cases.fits(ours, pair, gate.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "style", "activation"), [
    ("llama", "round_first", "silu"), ("qwen3", "round_first", "silu"), ("gemma3_text", "offset", "gelu_tanh"), ("olmo2", "round_last", "silu"),
])  # fmt: skip
def test_make_invariant_swaps_every_norm_and_gate(kind, style, activation, dtype):
    model = tiny_model(kind).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    model = model.to("cuda", dtype)
    before = {path: type(module) for path, module in model.named_modules()}
    done = make_invariant(model)
    assert done.not_exact == []
    for path, module in model.named_modules():
        if before[path].__name__.endswith("RMSNorm"):
            # in fp32 rounding first or last is the same
            assert module._tiled_style in ((style,) if dtype != torch.float32 or style == "offset" else ("round_first", "round_last"))
        elif before[path].__name__.endswith("MLP"):
            assert module._tiled_activation == activation
    done.undo()
    assert {path: type(module) for path, module in model.named_modules()} == before
