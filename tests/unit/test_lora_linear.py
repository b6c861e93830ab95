"""lora_linear on CPU: the registered operator, strides, refusals, both gradient modes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
import fastlora.ops.lora_linear  # registers torch.ops.fastlora
from fastlora.errors import InputError
from fastlora.exact import TokenSum
from fastlora.ops.dropout import DropoutKey


def make(tokens=40, inner=24, outer=20, rank=6, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, inner, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(outer, inner, generator=g).to(dtype)
    a = torch.randn(rank, inner, generator=g).requires_grad_()
    b = torch.randn(outer, rank, generator=g).requires_grad_()
    return x, weight, a, b, 0.5, torch.randn(outer, generator=g).to(dtype) if bias else None


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("frozen_input", [False, True])
def test_lora_linear_passes_opcheck(dropout, frozen_input):
    x, *rest = make()
    tokens = torch.arange(40) if dropout else None
    arguments = (x.detach() if frozen_input else x, *rest, dropout, 12345, tokens)
    results = torch.library.opcheck(torch.ops.fastlora.lora_linear.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_lora_linear_backward_passes_opcheck():
    x, weight, a, b, scale, _ = (t.detach() if isinstance(t, torch.Tensor) else t for t in make())
    s = torch.randn(40, 6)
    arguments = (torch.randn(40, 20), x, weight, a, b, s, scale, 0.0, 0, None, True)
    results = torch.library.opcheck(torch.ops.fastlora.lora_linear_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_lora_linear_compiles_without_a_break():
    x, weight, a, b, scale, bias = make()
    call = torch.compile(lambda x: fastlora.lora_linear(x, weight, a, b, scale, bias), fullgraph=True, backend="aot_eager")
    ours = call(x)
    theirs = fastlora.lora_linear(x, weight, a, b, scale, bias)
    assert torch.equal(ours, theirs)
    grads = torch.autograd.grad(ours.sum(), (x, a, b)), torch.autograd.grad(theirs.sum(), (x, a, b))
    assert all(torch.equal(one, other) for one, other in zip(*grads))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "batched"])
def test_lora_linear_takes_any_strides(layout):
    base, weight, a, b, scale, bias = make()
    base = base.detach()
    x = {
        "transposed": lambda: base.t().contiguous().t(),
        "sliced": lambda: torch.cat([base, base], 1)[:, :24],
        "offset": lambda: torch.cat([base.flatten()[:1], base.flatten()])[1:].view(40, 24),
        "batched": lambda: base.view(2, 20, 24).transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]()
    y = fastlora.lora_linear(x, weight, a, b, scale, bias)
    assert torch.equal(y.reshape(40, 20), fastlora.lora_linear(base, weight, a, b, scale, bias))


def test_lora_linear_of_no_tokens():
    x, weight, a, b, scale, bias = make(tokens=0)
    y = fastlora.lora_linear(x, weight, a, b, scale, bias)
    y.sum().backward()
    assert y.shape == (0, 20) and x.grad.shape == (0, 24)
    assert not a.grad.any() and not b.grad.any()


def test_lora_linear_exact_and_ordinary_gradients_agree():
    """Within the rounding of 2^-40 units a chunk and the order of the fp32 sum of chunks."""
    x, weight, a, b, scale, bias = make(tokens=300)
    sums = TokenSum(a.shape), TokenSum(b.shape)
    fastlora.lora_linear(x, weight, a, b, scale, bias, sums=sums).sum().backward()
    assert a.grad is None and b.grad is None
    dx = x.grad
    x.grad = None
    fastlora.lora_linear(x, weight, a, b, scale, bias).sum().backward()
    assert torch.equal(dx, x.grad)
    chunks = 3
    for total, grad in zip(sums, (a.grad, b.grad)):
        error = (total.gradient(1.0) - grad).abs().max()
        assert error <= chunks * (2.0**-41 + 2.0**-24 * chunks * grad.abs().max()) and grad.abs().max() > 0


@pytest.mark.parametrize("exact", [False, True])
def test_lora_linear_of_batches_is_that_of_their_rows_and_may_be_changed_in_place(exact):
    found = []
    for shape in ((40, 24), (2, 20, 24), (24,)):
        x, weight, a, b, scale, bias = make()
        x = (x.detach()[:1] if shape == (24,) else x.detach()).reshape(shape).requires_grad_()
        sums = (TokenSum(a.shape), TokenSum(b.shape)) if exact else None
        y = fastlora.lora_linear(x, weight, a, b, scale, bias, sums=sums)
        assert y.shape == (*shape[:-1], 20)
        y += 1.0
        (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        assert x.grad.shape == shape
        gradients = [total.total for total in sums] if exact else [a.grad, b.grad]
        found.append((y.detach().reshape(-1, 20), x.grad.reshape(-1, 24), *gradients))
    rows, batches, _ = found
    assert all(torch.equal(mine, other) for mine, other in zip(rows, batches))


def test_lora_linear_under_autocast_uses_the_autocast_dtype():
    x, weight, a, b, scale, bias = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastlora.lora_linear(x, weight, a, b, scale, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and a.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(4, 23)}, "x"),
        ({"x": torch.zeros(4, 24, dtype=torch.float64)}, "dtypes"),
        ({"a": torch.zeros(6, 25)}, "a, b"),
        ({"a": torch.zeros(300, 24), "b": torch.zeros(20, 300)}, "rank 300"),
        ({"bias": torch.zeros(19)}, "bias"),
        ({"bias": torch.zeros(20, dtype=torch.bfloat16)}, "bias"),
        ({"weight": torch.zeros(20, 24, requires_grad=True)}, "requires_grad"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": 0.5}, "key"),
    ],
)
def test_lora_linear_refuses_bad_input_by_name(change, names):
    x, weight, a, b, scale, bias = make()
    arguments = {"x": x, "weight": weight, "a": a, "b": b, "scale": scale, "bias": bias, "dropout": 0.0} | change
    with pytest.raises(InputError, match=names):
        fastlora.lora_linear(**arguments)


def test_lora_linear_dropout_is_the_key_and_nothing_else():
    x, weight, a, b, scale, bias = make()
    key = DropoutKey(77, torch.arange(40))
    once = fastlora.lora_linear(x, weight, a, b, scale, bias, dropout=0.3, key=key)
    torch.manual_seed(5)
    assert torch.equal(once, fastlora.lora_linear(x, weight, a, b, scale, bias, dropout=0.3, key=key))
    other = DropoutKey(78, torch.arange(40))
    assert not torch.equal(once, fastlora.lora_linear(x, weight, a, b, scale, bias, dropout=0.3, key=other))


def operators(graph):
    return [str(node.target) for node in graph.graph.nodes]


def test_what_looks_at_operators_finds_one_and_an_eager_call_is_none():
    x, weight, a, b, scale, bias = make()
    call = lambda x: fastlora.lora_linear(x, weight, a, b, scale, bias)  # noqa: E731
    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    eager = call(x)
    with Listening():
        listened = call(x)
    assert "fastlora.lora_linear.default" in seen and torch.equal(eager, listened)
    assert type(eager.grad_fn).__name__ == "_LoraLinearBackward" != type(listened.grad_fn).__name__
    assert "fastlora.lora_linear.default" in operators(make_fx(call)(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == (40, 20)


@pytest.mark.parametrize("exact", [False, True])
def test_transforms_are_refused(exact):
    x, weight, a, b, scale, bias = make()
    sums = (TokenSum(a.shape), TokenSum(b.shape)) if exact else None
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: fastlora.lora_linear(x, weight, a, b, scale, bias, sums=sums).sum())(x.detach())


def gradients_of(call, tensors, dy):
    call().backward(dy)
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", ["", "x", "a", "b"])
def test_an_eager_call_has_the_operator_s_bits_and_dtypes(dropout, of, frozen):
    x, weight, a, b, scale, bias = make(tokens=300, dtype=torch.bfloat16)
    a, b = (t.detach().to(of).requires_grad_() for t in (a, b))
    tensors = {"x": x, "a": a, "b": b}
    if frozen:
        tensors[frozen].requires_grad_(False)
    key = DropoutKey(12345, torch.arange(300))
    dy = torch.randn(300, 20).to(torch.bfloat16)
    ours = gradients_of(lambda: fastlora.lora_linear(x, weight, a, b, scale, bias, dropout=dropout, key=key), tensors.values(), dy)
    operator = lambda: torch.ops.fastlora.lora_linear(x, weight, a, b, scale, bias, dropout, 12345, key.tokens)[0]  # noqa: E731
    for name, one, other in zip(tensors, ours, gradients_of(operator, tensors.values(), dy)):
        assert (one is None) == (other is None) == (name == frozen)
        assert one is None or (one.dtype == tensors[name].dtype and torch.equal(one, other) and one.any())


@pytest.mark.parametrize("exact", [False, True])
def test_a_second_derivative_is_refused(exact):
    x, weight, a, b, scale, bias = make()
    sums = (TokenSum(a.shape), TokenSum(b.shape)) if exact else None
    y = fastlora.lora_linear(x, weight, a, b, scale, bias, sums=sums)
    dy = torch.ones(40, 20, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("exact", [False, True])
def test_no_gradient_above_gives_none(exact):
    x, weight, a, b, scale, bias = make()
    sums = (TokenSum(a.shape), TokenSum(b.shape)) if exact else None
    Nothing.apply(fastlora.lora_linear(x, weight, a, b, scale, bias, sums=sums)).sum().backward()
    assert x.grad is None and a.grad is None and b.grad is None
    assert not exact or all(total.chunks == 0 for total in sums)


def test_a_backward_under_autocast_rounds_nothing_more():
    x, weight, a, b, scale, bias = make()
    dy = torch.randn(40, 20)
    plain = gradients_of(lambda: fastlora.lora_linear(x, weight, a, b, scale, bias), (x, a, b), dy)
    y = fastlora.lora_linear(x, weight, a, b, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    assert all(torch.equal(one, other.grad) for one, other in zip(plain, (x, a, b)))
