"""The block level: forward and backward of each block of a decoder layer, against the same block frozen.

Systems: fastlora (exact sums; float sums; dropout), PEFT's maths, torch.compile of them, and Liger's kernels where it is installed.
Without a GPU the blocks run at small sizes through the torch reference.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.nn.functional import linear as product

from bench import check, maths, peers
from bench.cases import OURS, Case, Size, draw, kernels_run
from bench.fused import Adapted, Group, Mlp
from fastlora import stream
from fastlora.exact import TokenSum
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.lora_linear import lora_linear

FROZEN, PEFT, COMPILE, LIGER = "frozen", "peft", "compile", "liger"
SCALE, EPS, CHECK_ROWS = 2.0, 1e-5, 256
_SMALL = [(name, k, n) for name, k, n in (("smollm2", 576, 1536), ("llama-1b", 2048, 8192))]
SIZES = {
    "cuda": {
        "linear": [
            Size("4096x4096-r16", 8192, 4096, 4096), Size("4096x4096-r64", 8192, 4096, 4096, rank=64),
            Size("14336x4096-r16", 8192, 4096, 14336), Size("4096x14336-r16", 8192, 14336, 4096),
        ],
        "small": [Size(f"{name}-m{m}", m, k, n) for name, k, n in _SMALL for m in (128, 512, 1024, 2048, 4096)],
        "layer": [Size(f"llama-8b-r{r}", 8192, 4096, 14336, rank=r) for r in (16, 64)],
        "row": [Size("llama-8b", 8192, 4096, 14336)],
        "loss": [Size("llama-8b", 8192, 4096, 128256)],
    },
    "cpu": {
        "linear": [Size("cpu-256x192-r8", 512, 192, 256, rank=8)],
        "small": [Size("cpu-256x192-m64", 64, 192, 256, rank=8)],
        "layer": [Size("cpu-192-r8", 256, 192, 384, rank=8, heads=4, key_heads=2, head_dim=48)],
        "row": [Size("cpu-192", 512, 192, 384, heads=4, key_heads=2, head_dim=48)],
        "loss": [Size("cpu-1024x192", 256, 192, 1024)],
    },
}  # fmt: skip


# Tokens of a document, where a block is timed on several: M = 8,192 as 4 x 2,048.
DOCUMENT = 2048


def _on_documents(tokens: int, device: str, call):
    """``call`` as a training step makes it: its rows are documents of 2,048 tokens, or a shorter one."""
    each = min(tokens, DOCUMENT)
    count = tokens // each
    where = stream.Stream((each,) * count, stream.alignment_for(device), tuple(range(count)))

    def on_documents():
        with stream.use(where):
            return call()

    return on_documents


def _compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def _linear_verdict(inner: int, outer: int, rank: int, device: str, dtype: torch.dtype) -> check.Verdict:
    """The worst of our three ways; once for all numbers of tokens, which it does not depend on."""
    kinds = ((0.0, True), (0.0, False), (0.1, True))
    found = [check.linear(inner, outer, rank, dropout, exact, device, dtype) for dropout, exact in kinds]
    return max(found, key=lambda verdict: verdict.worst)


def linear(size: Size, device: str, dtype: torch.dtype) -> Case:
    """One linear layer, by the wall clock and by graph replay, which leaves the host out."""
    m, k, n, r = size.tokens, size.inner, size.outer, size.rank
    x, dy = draw(device, dtype, m, k).requires_grad_(), draw(device, dtype, m, n)
    weight = draw(device, dtype, n, k, scale=k**-0.5)
    a, b = (draw(device, torch.float32, *s, scale=f).requires_grad_() for s, f in (((r, k), k**-0.5), ((n, r), 0.1)))
    low = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
    sums = (TokenSum(a.shape, device), TokenSum(b.shape, device))
    key = DropoutKey(2**61 + 1, torch.arange(m, device=device))
    fused = _compiled(maths.lora)

    def backward(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.grad = a.grad = b.grad = low[0].grad = low[1].grad = None
        y.backward(dy)
        return y, x.grad

    calls = {
        FROZEN: lambda: backward(product(x, weight)),
        OURS: lambda: backward(lora_linear(x, weight, a, b, SCALE, sums=sums)),
        "fastlora-float": lambda: backward(lora_linear(x, weight, a, b, SCALE)),
        "fastlora-dropout": lambda: backward(lora_linear(x, weight, a, b, SCALE, sums=sums, dropout=0.1, key=key)),
        PEFT: lambda: backward(maths.lora(x, weight, *low, SCALE)),
        COMPILE: lambda: backward(fused(x, weight, *low, SCALE)),
    }

    calls = {name: _on_documents(m, device, call) if name.startswith(OURS) else call for name, call in calls.items()}
    return Case(FROZEN, calls, lambda: _linear_verdict(k, n, r, device, dtype), flops=4 * m * k * n, tokens=m, graphs=True)


def small_linear(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The same at small widths, against PEFT's maths."""
    case = linear(size, device, dtype)
    case.base = PEFT
    return case


def _leaves(factors):
    return [tuple(t.requires_grad_() for t in pair) for pair in factors]


def _gradients(outputs, upstreams, x, factors, names) -> dict:
    """y, dx and each layer's dA and dB."""
    flat = [t for pair in factors for t in pair]
    dx, *rest = torch.autograd.grad(outputs, [x, *flat], upstreams)
    found = {"y": torch.cat(list(outputs), dim=1).detach(), "dx": dx}
    for name, da, db in zip(names, rest[::2], rest[1::2]):
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = da, db
    return found


def _verified(weights, adapted: Adapted, ours, plain, x, dys, dtype) -> check.Verdict:
    """Our block against ``plain(x, weights, factors)`` in a wider dtype, on the first rows."""
    rows = slice(0, CHECK_ROWS)
    found = {}
    for kind in (dtype, maths.wider(dtype)):
        leaf = x.detach()[rows].to(kind).requires_grad_()
        factors = _leaves([tuple(t.to(kind) for t in pair) for pair in adapted.factors(dtype)])
        outputs = plain(leaf, [w.to(kind) for w in weights.values()], factors)
        found[kind] = _gradients(outputs, [d[rows].to(kind) for d in dys], leaf, factors, weights)
    return check.compare(ours(rows), found[dtype], found[maths.wider(dtype)], dtype)


def _adapter_case(size: Size, device, dtype, weights, groups, run, frozen, plain, upstreams) -> Case:
    """What QKV and the MLP share.

    Args:
        run: (adapted, x) -> outputs of our block. frozen: (x, weights) -> outputs. plain: (x, weights, factors) -> outputs.
        upstreams: gradient of each output.
    """
    x = draw(device, dtype, size.tokens, size.inner).requires_grad_()
    adapted = Adapted(weights, groups, size.rank, device)
    w, low = list(weights.values()), _leaves(adapted.factors(dtype))
    fused = _compiled(plain)
    joined = [torch.cat(upstreams, dim=1)] if adapted.groups else upstreams

    def backward(outputs, gradients) -> None:
        x.grad = None
        for pair in low:
            for t in pair:
                t.grad = None
        torch.autograd.backward(outputs, gradients)

    calls = {
        FROZEN: lambda: backward(frozen(x, w), upstreams),
        OURS: _on_documents(size.tokens, device, lambda: backward(run(adapted, x), joined)),
        PEFT: lambda: backward(plain(x, w, low), upstreams),
        COMPILE: lambda: backward(fused(x, w, low), upstreams),
    }

    def ours(rows: slice) -> dict:
        leaf = x.detach()[rows].clone().requires_grad_()
        own = Adapted(weights, groups, size.rank, device)
        with contextlib.ExitStack() as stack:
            own.exact_block(stack)
            outputs = run(own, leaf)
            (dx,) = torch.autograd.grad(outputs, (leaf,), [j[rows] for j in joined])
            return {"y": torch.cat(list(outputs), dim=1).detach(), "dx": dx} | own.sums()

    case = Case(FROZEN, calls, lambda: _verified(weights, adapted, ours, plain, x, upstreams, dtype))
    adapted.exact_block(case.stack)
    return case


def qkv(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Query, key and value."""
    widths = {"q": size.heads * size.head_dim} | dict.fromkeys(("k", "v"), size.key_heads * size.head_dim)
    weights = {name: draw(device, dtype, n, size.inner, scale=size.inner**-0.5) for name, n in widths.items()}
    upstreams = [draw(device, dtype, size.tokens, n) for n in widths.values()]

    def run(adapted: Adapted, x: torch.Tensor) -> list[torch.Tensor]:
        if adapted.groups is None:
            return [getattr(adapted.net, name)(x) for name in weights]
        return [Group.apply(x, *adapted.prepared(), *adapted.parameters)]

    def frozen(x, w):
        return [product(x, each) for each in w]

    def plain(x, w, factors):
        return list(maths.lora_qkv(x, w, factors, SCALE))

    return _adapter_case(size, device, dtype, weights, [list(weights)], run, frozen, plain, upstreams)


def mlp(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The SwiGLU feed-forward layer."""
    k, n = size.inner, size.outer
    shapes = {"gate": (n, k), "up": (n, k), "down": (k, n)}
    weights = {name: draw(device, dtype, *s, scale=s[1] ** -0.5) for name, s in shapes.items()}
    upstreams = [draw(device, dtype, size.tokens, k)]

    def run(adapted: Adapted, x: torch.Tensor) -> list[torch.Tensor]:
        if adapted.groups is None:
            net = adapted.net
            return [net.down(torch.nn.functional.silu(net.gate(x)) * net.up(x))]
        return [Mlp.apply(x, *adapted.prepared(), *adapted.parameters)]

    def frozen(x, w):
        return [maths.frozen_mlp(x, *w)]

    def plain(x, w, factors, gate=None):
        return [maths.lora_mlp(x, w, factors, SCALE, gate)]

    case = _adapter_case(size, device, dtype, weights, [["gate", "up"], ["down"]], run, frozen, plain, upstreams)
    if peers.installed("liger_kernel") and device == "cuda":
        x, w = draw(device, dtype, size.tokens, k).requires_grad_(), list(weights.values())
        low = _leaves([(draw(device, dtype, size.rank, s[1], scale=0.01), draw(device, dtype, s[0], size.rank)) for s in shapes.values()])
        case.calls[LIGER] = lambda: torch.autograd.grad(
            plain(x, w, low, peers.liger_glu), [x, *(t for pair in low for t in pair)], upstreams
        )
    return case


def norm(size: Size, device: str, dtype: torch.dtype) -> Case:
    """RMSNorm, as the decoder layer runs it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, dy = draw(device, dtype, size.tokens, size.inner).requires_grad_(), draw(device, dtype, size.tokens, size.inner)
    own = LlamaRMSNorm(size.inner, eps=EPS).to(device, dtype).requires_grad_(False)
    own.weight.copy_(draw(device, dtype, size.inner))
    fused = _compiled(own.forward)

    def by_autograd(forward, upstream=dy):
        return lambda: torch.autograd.grad(forward(x), (x,), upstream)

    if kernels_run(device, dtype):
        from fastlora.kernels.rms_norm import norm_backward, norm_forward

        def ours() -> tuple[torch.Tensor, torch.Tensor]:
            y, rstd, _ = norm_forward(x.detach(), own.weight, EPS, "round_first")
            return y, norm_backward(dy, x.detach(), rstd, own.weight, "round_first")[0]
    else:
        from fastlora.ops.rms_norm import rms_norm

        def ours() -> tuple[torch.Tensor, torch.Tensor]:
            y = rms_norm(x, own.weight, EPS)
            return y.detach(), *torch.autograd.grad(y, (x,), dy)

    def verify() -> check.Verdict:
        wide = maths.wider(dtype)
        leaf = x.detach().to(wide).requires_grad_()
        y = maths.norm(leaf, own.weight.to(wide), EPS)
        exact = {"y": y.detach(), "dx": torch.autograd.grad(y, (leaf,), dy.to(wide))[0]}
        plain = own(x)
        eager = {"y": plain.detach(), "dx": torch.autograd.grad(plain, (x,), dy)[0]}
        return check.compare(dict(zip(("y", "dx"), ours())), eager, exact, dtype)

    calls = {FROZEN: by_autograd(own), OURS: ours, COMPILE: by_autograd(fused)}
    if peers.installed("liger_kernel") and device == "cuda":
        # It writes its gradient over dy: a copy of its own, so that nobody else reads what it left.
        calls[LIGER] = by_autograd(lambda t: peers.liger_norm(t, own.weight, EPS), dy.clone())
    return Case(FROZEN, calls, verify, bytes_moved=5 * x.numel() * x.element_size())


def rope(size: Size, device: str, dtype: torch.dtype) -> Case:
    """RoPE of query and key."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    m, d, heads = size.tokens, size.head_dim, (size.heads, size.key_heads)
    q, k = (draw(device, dtype, 1, m, h, d).transpose(1, 2).requires_grad_() for h in heads)
    dq, dk = (draw(device, dtype, 1, m, h, d).transpose(1, 2) for h in heads)
    cos, sin = maths.angles(m, d, device, dtype)
    buffer, gradient = (draw(device, dtype, m, (heads[0] + 2 * heads[1]) * d) for _ in range(2))
    fused = _compiled(apply_rotary_pos_emb)

    def by_autograd(turn):
        return lambda: torch.autograd.grad(turn(q, k, cos[None], sin[None]), (q, k), (dq, dk))

    calls = {FROZEN: by_autograd(apply_rotary_pos_emb), COMPILE: by_autograd(fused)}
    if peers.installed("liger_kernel") and device == "cuda":
        calls[LIGER] = by_autograd(peers.liger_rope)
    if kernels_run(device, dtype):
        from bench.kernel_cases import rope as kernel
        from fastlora.kernels.rope import rotate

        def ours() -> None:
            rotate(buffer, cos, sin, sum(heads), d)
            rotate(gradient, cos, sin, sum(heads), d, inverse=True)

        calls[OURS] = ours
        return Case(FROZEN, calls, lambda: kernel(size, device, dtype).check(), bytes_moved=4 * m * sum(heads) * d * q.element_size())
    return Case(FROZEN, calls, lambda: check.Verdict("", 0.0), notes=["no reference path: RoPE is transformers' own on a CPU"])


def loss(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The head and the loss over every row."""
    from fastlora.ops.linear_cross_entropy import linear_cross_entropy

    h, w = draw(device, dtype, size.tokens, size.inner).requires_grad_(), draw(device, dtype, size.outer, size.inner, scale=0.02)
    labels = torch.randint(0, size.outer, (size.tokens,), device=device)
    fused = _compiled(maths.loss)

    def gradient(function, hidden=h, rows=slice(None), weight=w):
        return torch.autograd.grad(function(hidden, weight, labels[rows]), (hidden,))[0]

    def ours(hidden, weight, chosen):
        return linear_cross_entropy(hidden, weight, chosen)[0]

    def verify() -> check.Verdict:
        rows, found = slice(0, CHECK_ROWS), []
        for function, kind in ((ours, dtype), (maths.loss, dtype), (maths.loss, maths.wider(dtype))):
            leaf = h.detach()[rows].to(kind).requires_grad_()
            found.append({"dh": gradient(function, leaf, rows, w.to(kind))})
        return check.compare(*found, dtype)

    calls = {FROZEN: lambda: gradient(maths.loss), OURS: lambda: gradient(ours), COMPILE: lambda: gradient(fused)}
    if peers.installed("liger_kernel") and device == "cuda":
        calls[LIGER] = lambda: gradient(peers.liger_loss)
    return Case(FROZEN, calls, verify, flops=4 * size.tokens * size.inner * size.outer)


# name: (how it is made, its list of sizes, systems)
BLOCKS = {
    "linear": (linear, "linear", (OURS, "fastlora-float", "fastlora-dropout", PEFT, COMPILE)),
    "small-linear": (small_linear, "small", (OURS, "fastlora-float")),
    "qkv": (qkv, "layer", (OURS, PEFT, COMPILE)),
    "mlp": (mlp, "layer", (OURS, PEFT, COMPILE, LIGER)),
    "norm": (norm, "row", (OURS, COMPILE, LIGER)),
    "rope": (rope, "row", (OURS, COMPILE, LIGER)),
    "loss": (loss, "loss", (OURS, COMPILE, LIGER)),
}


def all_cases(device: str) -> list[tuple[str, Size, str]]:
    """(block, size, system) of every test on this device; torch.compile and Liger on a GPU alone."""
    found = []
    for name, (_, sizes, systems) in BLOCKS.items():
        usable = [s for s in systems if device == "cuda" or s not in (COMPILE, LIGER)]
        if device == "cpu" and name == "rope":
            continue  # transformers' own code runs there
        usable = [s for s in usable if s != LIGER or peers.installed("liger_kernel")]
        found += [(name, size, system) for size in SIZES[device][sizes] for system in usable]
    # what is compiled takes longest: last, so that a run cut short has the rest
    return sorted(found, key=lambda case: case[2] == COMPILE)


def make(name: str, size: Size, device: str, dtype: torch.dtype) -> Case:
    """The case of a block."""
    return BLOCKS[name][0](size, device, dtype)
