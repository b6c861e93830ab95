"""The row-wise kernels in the interpreter: against float64 on shapes with every kind of edge, and rows that know no neighbours.

Every buffer that a kernel should fill begins as NaN, so an element that no program writes shows.
"""

from __future__ import annotations

import pytest
import torch

from fastlora.errors import InputError
from fastlora.kernels.glu import glu_pair_backward, glu_pair_forward
from fastlora.kernels.rms_norm import norm_backward, norm_forward
from fastlora.kernels.rope import rotate
from fastlora.ops import backend
from fastlora.ops.glu import ACTIVATIONS, glu
from fastlora.ops.rms_norm import STYLES, rms_norm
from tests import row_cases as cases

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]
# The interpreter's own conversion to bf16 rounds wrongly, so bf16 is the GPU tests'.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
OPERATIONS = sorted(cases.row_operations(48, 16, torch.float32, "cpu"))


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (5, 33), (4, 64)])
def test_norm_forward_matches_float64(rows, width, style, dtype):
    h, add, weight = cases.draw(dtype, "cpu", (rows, width), (rows, width), (width,))
    for scale, wanted in ((None, h), (1.0, h + add), (0.22, h + add * 0.22)):
        x, rstd, total = norm_forward(h, weight, cases.EPS, style, add=None if scale is None else add, scale=scale or 1.0)
        assert torch.equal(total, wanted)
        truth = cases.norm_truth(total, weight, style)
        assert cases.fits(x, truth[0], dtype) and cases.fits(rstd, truth[1], torch.float32)
        assert x.dtype == dtype and rstd.dtype == torch.float32


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (5, 33), (4, 64)])
def test_norm_backward_matches_float64(rows, width, style, dtype):
    dx, h, residual, weight = cases.draw(dtype, "cpu", *3 * [(rows, width)], (width,))
    x, rstd, _ = norm_forward(h, weight, cases.EPS, style)
    for extra in (None, residual):
        dh, again = norm_backward(dx, h, rstd, weight, style, residual=extra, emit=extra is None)
        assert cases.fits(dh, cases.norm_backward_truth(dx, h, weight, style, extra), dtype)
        assert torch.equal(again, x) if extra is None else again is None


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("widths", [(32, 16), (40, 8)], ids=str)
def test_norm_of_columns_matches_float64_and_touches_nothing_else(widths, style, dtype):
    assert cases.norm_columns_failures(5, widths, style, dtype, "cpu") == []


def test_norm_refuses_a_target_that_it_cannot_write_in_place():
    h, weight = torch.ones(4, 8), torch.ones(8)
    for into, said in ((torch.zeros(4, 7), "shape"), (torch.zeros(8, 4).t(), "strides"), (torch.zeros(4, 9)[:, 1:], "16-byte")):
        with pytest.raises(InputError, match=f"into.*{said}"):
            norm_forward(h, weight, cases.EPS, "round_last", into=into)
        with pytest.raises(InputError, match=f"into.*{said}"):
            norm_backward(h, h, torch.ones(4), weight, "round_last", into=into)


# heads, head width, features that turn, columns beyond the heads
HEADS = [(3, 16, 16, 0), (5, 24, 24, 8), (2, 16, 8, 3), (1, 10, 6, 0)]
IDS = [f"h{h}-d{d}-r{r}-beyond{b}" for h, d, r, b in HEADS]


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", HEADS, ids=IDS)
def test_rotate_matches_float64_and_touches_nothing_else(case, inverse, dtype):
    cos, sin = cases.draw(dtype, "cpu", *2 * [(7, case[2])], seed=3)
    assert cases.rotate_failures(case, cos, sin, inverse, dtype, "cpu") == []


@DTYPES
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("turning", [True, False])
@pytest.mark.parametrize("case", HEADS[:3], ids=IDS[:3])
def test_head_norm_rotate_matches_float64(case, turning, style, dtype):
    cos, sin = cases.draw(torch.float32, "cpu", *2 * [(6, case[2])], seed=3) if turning else (None, None)
    assert cases.head_norm_failures(case, 6, cos, sin, style, dtype, "cpu") == []


@DTYPES
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 64), (6, 75)])
def test_glu_matches_float64(rows, width, activation, dtype):
    assert cases.glu_failures(rows, width, activation, dtype, "cpu") == []


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_glu_is_finite_for_large_gates(activation):
    gate = torch.tensor([[-1e18, -3e4, -200.0, -88.8, 0.0, 88.8, 200.0, 3e4, 1e18]])
    up = torch.ones_like(gate)
    hidden = glu_pair_forward(gate, up, activation)
    dgate, _ = glu_pair_backward(up, gate, up, activation)
    # there the activation is 0 or the gate itself, and its slope 0 or 1 (1/2 at 0)
    assert torch.equal(hidden + 0.0, gate.clamp(min=0.0))
    assert torch.equal(dgate + 0.0, (gate > 0) + 0.5 * (gate == 0))


@DTYPES
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_do_not_depend_on_place_or_number(name, dtype):
    shapes, function = cases.row_operations(48, 16, dtype, "cpu")[name]
    inputs = cases.draw(dtype, "cpu", *((9, *shape) for shape in shapes))
    together = function(*inputs)
    for chosen in ([8, 0, 5], [4], list(range(1, 9))):
        for one, many in zip(function(*(x[chosen] for x in inputs)), together):
            assert torch.equal(one, many[chosen])


def test_row_kernels_take_no_rows():
    for shapes, function in cases.row_operations(48, 16, torch.float32, "cpu").values():
        outputs = function(*(torch.zeros(0, *shape) for shape in shapes))
        assert all(y is None or y.shape[0] == 0 for y in outputs)


def test_rotate_refuses_what_it_cannot_turn_in_place():
    cos = torch.ones(4, 8)
    for buffer, said in (
        (torch.zeros(4, 15), "shape"),
        (torch.zeros(16, 4).t(), "strides"),
        (torch.zeros(4, 17)[:, 1:], "16-byte"),
    ):
        with pytest.raises(InputError, match=said):
            rotate(buffer, cos, cos, 2, 8)
    with pytest.raises(InputError, match="cos, sin"):
        rotate(torch.zeros(4, 16), cos[:3], cos[:3], 2, 8)


@pytest.mark.parametrize("style", STYLES)
def test_rms_norm_by_kernel_matches_float64(style):
    x, weight, dy = cases.draw(torch.float32, "cpu", (2, 3, 40), (40,), (2, 3, 40))
    leaf = x.clone().requires_grad_()
    with backend.use("triton"):
        y = rms_norm(leaf, weight, cases.EPS, style)
    y.backward(dy)
    assert cases.fits(y.detach(), cases.norm_truth(x, weight, style)[0], x.dtype)
    assert cases.fits(leaf.grad, cases.norm_backward_truth(dy, x, weight, style), x.dtype)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_glu_by_kernel_matches_float64(activation):
    gate, up, dh = cases.draw(torch.float32, "cpu", *3 * [(2, 3, 40)])
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    with backend.use("triton"):
        hidden = glu(*leaves, activation)
    hidden.backward(dh)
    for ours, pair in zip((hidden.detach(), leaves[0].grad, leaves[1].grad), cases.glu_truth(dh, gate, up, activation)):
        assert cases.fits(ours, pair, gate.dtype)
