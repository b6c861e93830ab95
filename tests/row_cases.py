"""The row-wise kernels' float64 answers with derived bounds, and their operations as functions of rows: shared by the interpreter's
and the GPU's tests.

Every ``*_truth`` gives pairs (exact float64, bound). A bound adds what each rounding may lose: gamma(n) for n fp32 operations on
a term, the dtype's unit for each rounding to the dtype.
"""

from __future__ import annotations

import torch

from fastlora.kernels.glu import glu_backward, glu_forward, glu_pair_backward, glu_pair_forward
from fastlora.kernels.rms_norm import norm_backward, norm_forward
from fastlora.kernels.rope import head_norm_rotate, head_norm_rotate_backward, rotate

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What an underflowing step may lose (fp16's least number is 2^-24), times factors of at most 2^3.
FLOOR = {torch.float32: 2.0**-120, torch.float16: 2.0**-21, torch.bfloat16: 2.0**-120}
EPS = 1e-5


def gamma(terms: int) -> float:
    """Relative loss of ``terms`` fp32 roundings on one term (Higham)."""
    loss = terms * 2.0**-24
    return loss / (1 - loss)


def fits(ours: torch.Tensor, pair, dtype: torch.dtype) -> bool:
    """Whether every element lies within its own bound (NaN does not)."""
    exact, bound = pair
    return ours.shape == exact.shape and bool(((ours.double() - exact).abs() <= bound + FLOOR[dtype]).all())


def draw(dtype, device, *shapes, seed=0):
    """Standard normal tensors."""
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(*shape, generator=g, device=device).to(dtype) for shape in shapes]


def rounded(exact, bound, dtype, times=1):
    """The pair after ``times`` roundings to the dtype."""
    unit = UNIT[dtype]
    return exact, bound + 1.01 * times * unit * (exact.abs() + bound)


def norm_parts(h, weight, style, eps=EPS):
    """n, r and the factor in float64."""
    h, factor = h.double(), weight.double() + (style == "offset")
    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h * r, r, factor


def norm_truth(h, weight, style):
    """(x, rstd)."""
    n, r, factor = norm_parts(h, weight, style)
    x, loss = n * factor, gamma(h.shape[-1] + 16)
    return rounded(x, x.abs() * loss, h.dtype, 2 if style == "round_first" else 1), (r[..., 0], loss * r[..., 0])


def norm_backward_truth(dx, h, weight, style, residual=None, turned=None):
    """dh. ``turned``: bound of dx where it is itself computed (then dx is float64)."""
    n, r, factor = norm_parts(h, weight, style)
    dn = dx.double() * factor
    size = (dx.double().abs() if turned is None else turned) * factor.abs()
    exact = (dn - n * (n * dn).mean(-1, keepdim=True)) * r
    size = (size + n.abs() * (n.abs() * size).mean(-1, keepdim=True)) * r
    if residual is not None:
        exact, size = exact + residual.double(), size + residual.double().abs()
    # r and the mean, each of K terms, enter twice
    return rounded(exact, size * gamma(4 * h.shape[-1] + 64), h.dtype)


def turn(x, cos, sin, inverse=False):
    """(RoPE of [M, H, D], the same with every term positive) in float64; cos, sin [M, R], R <= D."""
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    half = cos.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c1, c2, s1, s2 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    terms = (a * c1, b * s2, b * c2, -a * s1) if inverse else (a * c1, -b * s1, b * c2, a * s2)
    exact = torch.cat((terms[0] + terms[1], terms[2] + terms[3], rest), -1)
    return exact, torch.cat((terms[0].abs() + terms[1].abs(), terms[2].abs() + terms[3].abs(), rest.abs()), -1)


def rotate_truth(x, cos, sin, inverse=False):
    """x [M, H, D] turned."""
    exact, size = turn(x, cos, sin, inverse)
    return rounded(exact, gamma(4) * size, x.dtype)


def head_weight(weight_q, weight_k, heads):
    """[1, H, D]: the weight of each head."""
    q, k = heads
    return torch.cat((weight_q.expand(q, -1), weight_k.expand(k, -1)))[None]


def head_norm_truth(x, weight, style, cos, sin):
    """(rotated, rstd) of x [M, H, D]; weight [1, H, D]; cos None: only the norm."""
    n, r, factor = norm_parts(x, weight, style)
    loss = gamma(x.shape[-1] + 20) + 1.01 * (2 if style == "round_first" else 1) * UNIT[x.dtype]
    y = n * factor
    exact, size = (y, y.abs()) if cos is None else turn(y, cos, sin)
    return rounded(exact, loss * size, x.dtype), (r[..., 0], gamma(x.shape[-1] + 16) * r[..., 0])


def head_norm_backward_truth(g, x, weight, style, cos, sin):
    """Gradient of x [M, H, D] from g, that of the rotated heads."""
    exact, size = (g.double(), g.double().abs()) if cos is None else turn(g, cos, sin, inverse=True)
    return norm_backward_truth(exact, x, weight, style, turned=size)


PHI = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: g * torch.special.ndtr(g),
    "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
}


def glu_truth(dh, gate, up, activation):
    """(hidden, dgate, dup)."""
    g = gate.double().requires_grad_()
    act = PHI[activation](g)
    slope = torch.autograd.grad(act.sum(), g)[0]
    g, act, u, d, dtype = g.detach().abs(), act.detach(), up.double(), dh.double(), gate.dtype
    # exp(x) as 2^(x log2 e): the rounded exponent loses |x| units, |x| <= 1.6 |g| (1 + g^2 / 20)
    unit = 2.0**-24 * (16 + 4 * g + g**3)
    act_loss, slope_loss = g * unit, (1 + g) * (1 + g * g / 4) * unit
    return (
        rounded(act * u, act_loss * u.abs(), dtype, 2),
        rounded(d * u * slope, slope_loss * (d * u).abs(), dtype, 2),
        rounded(d * act, act_loss * d.abs(), dtype, 2),
    )


def angles(rows, rotary, dtype, device):
    """cos, sin [M, R] as transformers gives them: both halves alike."""
    at = torch.arange(rows, device=device)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2, device=device) / rotary)
    at = torch.cat((at, at), -1)
    return at.cos().to(dtype), at.sin().to(dtype)


def failures(checks: dict[str, bool]) -> list[str]:
    """Names of the checks that do not hold."""
    return [name for name, holds in checks.items() if not holds]


def norm_columns_failures(rows, widths, style, dtype, device):
    """What is wrong with norms over two groups of columns of a wider buffer, from one buffer into another and back in place."""
    first, second = widths
    total = first + second
    raw, grad = draw(dtype, device, (rows, total + 16), (rows, total + 32))
    before, out = grad.clone(), torch.full((rows, total + 8), 7.0, device=device, dtype=dtype)
    checks = {}
    for start, width in ((0, first), (first, second)):
        at = slice(start, start + width)
        (weight,) = draw(dtype, device, (width,), seed=width)
        x, rstd, same = norm_forward(raw[:, at], weight, EPS, style, into=out[:, at])
        norm_backward(grad[:, at], raw[:, at], rstd, weight, style, into=grad[:, at])
        truth = norm_truth(raw[:, at], weight, style)
        checks |= {
            f"x from {start}": fits(out[:, at], truth[0], dtype) and x.data_ptr() == out[:, at].data_ptr(),
            f"rstd from {start}": fits(rstd, truth[1], torch.float32),
            f"dh from {start}": fits(grad[:, at], norm_backward_truth(before[:, at], raw[:, at], weight, style), dtype),
            f"no copy from {start}": same.data_ptr() == raw[:, at].data_ptr(),
        }
    rest = slice(total, None)
    return failures(checks | {"columns beyond": bool((out[:, rest] == 7).all()) and torch.equal(grad[:, rest], before[:, rest])})


def rotate_failures(sizes, cos, sin, inverse, dtype, device):
    """What is wrong with RoPE in place. sizes: (heads, head width, features that turn, columns beyond the heads)."""
    heads, width, rotary, beyond = sizes
    (buffer,) = draw(dtype, device, (len(cos), heads * width + beyond))
    before = buffer.clone()
    rotate(buffer, cos, sin, heads, width, inverse=inverse)
    ours, x = (t[:, : heads * width].unflatten(1, (heads, width)) for t in (buffer, before))
    return failures({
        "within its bound": fits(ours, rotate_truth(x, cos, sin, inverse), dtype),
        "features that do not turn": torch.equal(ours[..., rotary:], x[..., rotary:]),
        "columns beyond the heads": torch.equal(buffer[:, heads * width :], before[:, heads * width :]),
    })  # fmt: skip


def head_norm_failures(sizes, rows, cos, sin, style, dtype, device):
    """What is wrong with the norm of heads and RoPE, forward and backward. sizes as in :func:`rotate_failures`; cos None: no RoPE."""
    heads, width, _, beyond = sizes
    split, columns = (heads - 1, 1), heads * width
    raw, grad = draw(dtype, device, (rows, columns + beyond), (rows, columns + 2 * beyond))
    weight_q, weight_k = draw(dtype, device, (width,), (width,), seed=2)
    weight = head_weight(weight_q, weight_k, split)
    x, g = (t[:, :columns].unflatten(1, (heads, width)).clone() for t in (raw, grad))
    rotated, rstd = head_norm_rotate(raw, weight_q, weight_k, EPS, style, cos, sin, *split, width)
    truth = head_norm_truth(x, weight, style, cos, sin)
    rest = grad[:, columns:].clone()
    head_norm_rotate_backward(grad, raw, rstd, weight_q, weight_k, style, cos, sin, *split, width)
    ours = grad[:, :columns].unflatten(1, (heads, width))
    return failures({
        "rotated": fits(rotated.unflatten(1, (heads, width)), truth[0], dtype),
        "rstd": fits(rstd, truth[1], torch.float32),
        "gradient": fits(ours, head_norm_backward_truth(g, x, weight, style, cos, sin), dtype),
        "columns beyond the heads": torch.equal(grad[:, columns:], rest),
    })  # fmt: skip


def glu_failures(rows, width, activation, dtype, device):
    """What is wrong with a gate, from one buffer and from two."""
    gate_up, dh = draw(dtype, device, (rows, 2 * width), (rows, width))
    gate_up *= 3
    gate, up = gate_up.split(width, 1)
    hidden = glu_forward(gate_up, activation)
    d, again = glu_backward(dh, gate_up, activation, emit=True)
    results = dict(zip(("hidden", "dgate", "dup"), zip((hidden, *d.split(width, 1)), glu_truth(dh, gate, up, activation))))
    return failures({name: fits(ours, pair, dtype) for name, (ours, pair) in results.items()} | {
        "hidden again": torch.equal(again, hidden),
        "nothing emitted unasked": glu_backward(dh, gate_up, activation)[1] is None,
        "hidden of a pair": torch.equal(glu_pair_forward(gate, up, activation), hidden),
        "gradients of a pair": torch.equal(torch.cat(glu_pair_backward(dh, gate, up, activation), 1), d),
    })  # fmt: skip


def row_operations(width, head, dtype, device):
    """name -> (shapes of its row inputs, function of them to its row outputs)."""
    weight, short = draw(dtype, device, (width,), (head,), seed=1)
    heads = width // head

    def norm(h, add):
        x, rstd, total = norm_forward(h, weight, EPS, "round_first", add=add, scale=0.5)
        return x, rstd, total

    def norm_back(dx, h, residual):
        _, rstd, _ = norm_forward(h, weight, EPS, "offset")
        return norm_backward(dx, h, rstd, weight, "offset", residual=residual, emit=True)

    def norm_columns(h, dx):
        dx, part = dx.clone(), slice(0, head)
        x, rstd, _ = norm_forward(h[:, part], short, EPS, "round_last")
        norm_backward(dx[:, part], h[:, part], rstd, short, "round_last", into=dx[:, part])
        return x, rstd, dx

    def rope(x, cos, sin):
        x = x.clone()
        rotate(x, cos, sin, heads, head)
        return (x,)

    def head_norm(x, g, cos, sin):
        out, rstd = head_norm_rotate(x, short, short, EPS, "round_last", cos, sin, heads - 1, 1, head)
        g = g.clone()
        head_norm_rotate_backward(g, x, rstd, short, short, "round_last", cos, sin, heads - 1, 1, head)
        return out, rstd, g

    def gate(gate_up, dh):
        return glu_forward(gate_up, "silu"), *glu_backward(dh, gate_up, "gelu_tanh", emit=True)

    full, turned = (width,), (head,)
    return {
        "norm": ((full, full), norm),
        "norm_backward": ((full, full, full), norm_back),
        "norm_narrow": ((turned,), lambda h: norm_forward(h, short, EPS, "round_first")),
        "norm_columns": ((full, full), norm_columns),
        "rope": ((full, turned, turned), rope),
        "head_norm": ((full, full, turned, turned), head_norm),
        "glu": (((2 * width,), full), gate),
    }
