"""The kernel level: each kernel against cuBLAS (``torch.mm``), or against a copy of the bytes that it has to move.

Without a GPU the operations run through their torch reference, where they have one of their own.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import check, maths
from bench.cases import OURS, Case, Size, draw, kernels_run
from fastlora.exact import TokenSum

CUBLAS, COPY, SDPA = "cuBLAS", "copy of the same bytes", "sdpa"
EPS = 1e-5
SIZES = {
    "cuda": {
        "product": [
            Size("4096x4096-r16", 8192, 4096, 4096), Size("6144x4096-r16", 8192, 4096, 6144),
            Size("28672x4096-r16", 8192, 4096, 28672), Size("4096x14336-r16", 8192, 14336, 4096),
        ],
        "low": [Size("4096x4096-r16", 8192, 4096, 4096), Size("4096x4096-r64", 8192, 4096, 4096, rank=64)],
        "row": [
            Size("llama-8b", 8192, 4096, 14336), Size("smollm2", 8192, 576, 1536, heads=9, key_heads=3, head_dim=64),
        ],
        "loss": [Size("128256x4096", 2048, 4096, 128256)],
        "attention": [Size("4x2048", 8192, 4096, 4096), Size("32x256", 8192, 4096, 4096)],
    },
    "cpu": {
        "product": [Size("cpu-256x192-r8", 512, 192, 256, rank=8)],
        "low": [],
        "row": [Size("cpu-192", 512, 192, 384, heads=4, key_heads=2, head_dim=32)],
        "loss": [],
        "attention": [Size("cpu-2x128", 256, 128, 128, heads=4, key_heads=2, head_dim=32)],
    },
}  # fmt: skip


def copy_of(bytes_moved: int, device: str):
    """A copy that reads and writes ``bytes_moved`` in all."""
    source = torch.randint(-128, 127, (bytes_moved // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _factors(size: Size, device: str, dtype: torch.dtype, columns: int | None = None):
    """A and B, of as many rank columns as the kernels store."""
    rank = columns or size.rank
    return draw(device, dtype, rank, size.inner, scale=size.inner**-0.5), draw(device, dtype, size.outer, rank, scale=0.1)


def gemm_forward(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Y = x W^T + S B^T against x W^T."""
    x, w = draw(device, dtype, size.tokens, size.inner), draw(device, dtype, size.outer, size.inner, scale=size.inner**-0.5)
    a, b = _factors(size, device, dtype)
    calls, notes = {CUBLAS: lambda: torch.mm(x, w.t())}, []
    if kernels_run(device, dtype):
        from fastlora.kernels.gemm import gemm
        from fastlora.kernels.launch import padded_rank

        a, b = _factors(size, device, dtype, padded_rank(size.rank))
        s = draw(device, dtype, size.tokens, b.shape[1])
        calls[OURS] = lambda: gemm(x, w, s, b, transposed=True)
        calls["fastlora-r0"] = lambda: gemm(x, w, transposed=True)
    else:
        from fastlora.ops.reference import forward_ref

        calls[OURS] = lambda: forward_ref(x, w, a, b, 1.0)
        notes.append("the reference computes S too")
    verify = lambda: check.linear(size.inner, size.outer, size.rank, 0.0, False, device, dtype)  # noqa: E731
    return Case(CUBLAS, calls, verify, flops=2 * size.tokens * size.inner * size.outer, notes=notes)


def gemm_dx(size: Size, device: str, dtype: torch.dtype) -> Case:
    """dX = dY W + dS A against dY W."""
    dy, w = draw(device, dtype, size.tokens, size.outer), draw(device, dtype, size.outer, size.inner, scale=size.inner**-0.5)
    a, b = _factors(size, device, dtype)
    calls, notes = {CUBLAS: lambda: torch.mm(dy, w)}, []
    if kernels_run(device, dtype):
        from fastlora.kernels.gemm import gemm
        from fastlora.kernels.launch import padded_rank

        a, b = _factors(size, device, dtype, padded_rank(size.rank))
        ds = draw(device, dtype, size.tokens, a.shape[0])
        calls[OURS] = lambda: gemm(dy, w, ds, a, transposed=False)
    else:
        from fastlora.ops.reference import backward_ref

        x, s = draw(device, dtype, size.tokens, size.inner), draw(device, dtype, size.tokens, size.rank)
        calls[OURS] = lambda: backward_ref(dy, x, w, a, b, s, 1.0, needs_dx=True)
        notes.append("the reference computes dS, dA and dB too")
    verify = lambda: check.linear(size.inner, size.outer, size.rank, 0.0, False, device, dtype)  # noqa: E731
    return Case(CUBLAS, calls, verify, flops=2 * size.tokens * size.inner * size.outer, notes=notes)


def low_rank(size: Size, device: str, dtype: torch.dtype, which: str) -> Case:
    """S, dS with dB, or dA: one pass over x or dY."""
    from fastlora.kernels.chunks import chunks_of
    from fastlora.kernels.columns import single
    from fastlora.kernels.project import project
    from fastlora.kernels.token_sum import sum_a
    from fastlora.ops.triton_path import low_rank_gradients

    wide = size.inner if which != "ds-db" else size.outer
    layout = single(size.rank, size.outer, 1.0)
    x, s = draw(device, dtype, size.tokens, wide), draw(device, dtype, size.tokens, layout.columns)
    chunks = chunks_of(size.tokens, ((0, size.tokens),), x.device)
    a, b = _factors(size, device, dtype, layout.columns)
    if which == "s":
        own = lambda: project(x, a, layout)  # noqa: E731
    elif which == "ds-db":
        sink = TokenSum((size.outer, size.rank), device)
        own = lambda: low_rank_gradients(x, s, b, layout, chunks, sink)  # noqa: E731
    else:
        sink = TokenSum((size.rank, size.inner), device)
        own = lambda: sum_a(x, s, layout, chunks, sink=sink)  # noqa: E731
    moved = (x.numel() + s.numel()) * x.element_size()
    verify = lambda: check.linear(size.inner, size.outer, size.rank, 0.0, True, device, dtype)  # noqa: E731
    return Case(COPY, {COPY: copy_of(moved, device), OURS: own}, verify, bytes_moved=moved)


def norm_forward(size: Size, device: str, dtype: torch.dtype) -> Case:
    """RMSNorm of rows; on a GPU with the residual sum in front, as a decoder layer has it."""
    h, add, w = (draw(device, dtype, *s) for s in ((size.tokens, size.inner), (size.tokens, size.inner), (size.inner,)))
    if kernels_run(device, dtype):
        from fastlora.kernels import rms_norm as file

        own, tensors = (lambda: file.norm_forward(h, w, EPS, "round_first", add=add)), 4
        ours = lambda: {"x": file.norm_forward(h, w, EPS, "round_first")[0]}  # noqa: E731
    else:
        from fastlora.ops.rms_norm import rms_norm

        own, tensors = (lambda: rms_norm(h, w, EPS)), 2
        ours = lambda: {"x": rms_norm(h, w, EPS)}  # noqa: E731

    def verify() -> check.Verdict:
        wide = maths.wider(dtype)
        eager = (w * (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + EPS)).to(dtype))
        return check.compare(ours(), {"x": eager}, {"x": maths.norm(h.to(wide), w.to(wide), EPS)}, dtype)

    moved = tensors * h.numel() * h.element_size()
    return Case(COPY, {COPY: copy_of(moved, device), OURS: own}, verify, bytes_moved=moved)


def norm_backward(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The norm's gradient with the residual's added, and the norm's output once more."""
    from fastlora.kernels import rms_norm as file

    h, dx, residual = (draw(device, dtype, size.tokens, size.inner) for _ in range(3))
    w = draw(device, dtype, size.inner)
    _, rstd, _ = file.norm_forward(h, w, EPS, "round_first")

    def own():
        return file.norm_backward(dx, h, rstd, w, "round_first", residual=residual, emit=True)

    def gradient(wide: torch.dtype) -> torch.Tensor:
        x = h.to(wide).requires_grad_()
        (found,) = torch.autograd.grad(maths.norm(x, w.to(wide), EPS), (x,), dx.to(wide))
        return found + residual.to(wide)

    def verify() -> check.Verdict:
        return check.compare({"dh": own()[0]}, {"dh": gradient(dtype)}, {"dh": gradient(maths.wider(dtype))}, dtype)

    moved = 5 * h.numel() * h.element_size()
    return Case(COPY, {COPY: copy_of(moved, device), OURS: own}, verify, bytes_moved=moved)


def rope(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Query and key heads turned in place inside the buffer of Q, K and V."""
    from fastlora.kernels.rope import rotate

    heads, wide = size.heads + size.key_heads, (size.heads + 2 * size.key_heads) * size.head_dim
    buffer = draw(device, dtype, size.tokens, wide)
    cos, sin = maths.angles(size.tokens, size.head_dim, device, dtype)

    def verify() -> check.Verdict:
        turned = buffer.clone()
        rotate(turned, cos, sin, heads, size.head_dim)
        part = buffer[:, : heads * size.head_dim].view(size.tokens, heads, size.head_dim)
        found = {
            kind: {"q, k": maths.turn(part.to(kind), cos.to(kind), sin.to(kind)).flatten(1)} for kind in (dtype, maths.wider(dtype))
        }
        return check.compare({"q, k": turned[:, : heads * size.head_dim]}, found[dtype], found[maths.wider(dtype)], dtype)

    moved = 2 * size.tokens * heads * size.head_dim * buffer.element_size()
    calls = {COPY: copy_of(moved, device), OURS: lambda: rotate(buffer, cos, sin, heads, size.head_dim)}
    return Case(COPY, calls, verify, bytes_moved=moved)


def glu_forward(size: Size, device: str, dtype: torch.dtype) -> Case:
    """act(gate) * up."""
    both = draw(device, dtype, size.tokens, 2 * size.outer)
    gate, up = both.chunk(2, dim=1)
    if kernels_run(device, dtype):
        from fastlora.kernels.glu import glu_forward as kernel

        own = lambda: kernel(both, "silu")  # noqa: E731
    else:
        from fastlora.ops.glu import glu

        own = lambda: glu(gate, up, "silu")  # noqa: E731

    def verify() -> check.Verdict:
        found = {
            kind: {"hidden": torch.nn.functional.silu(gate.to(kind)) * up.to(kind)} for kind in (dtype, maths.wider(dtype))
        }
        return check.compare({"hidden": own()}, found[dtype], found[maths.wider(dtype)], dtype)

    moved = 3 * gate.numel() * both.element_size()
    return Case(COPY, {COPY: copy_of(moved, device), OURS: own}, verify, bytes_moved=moved)


def glu_backward(size: Size, device: str, dtype: torch.dtype) -> Case:
    """The gate's gradients, and its product once more."""
    from fastlora.kernels.glu import glu_backward as kernel

    both, d = draw(device, dtype, size.tokens, 2 * size.outer), draw(device, dtype, size.tokens, size.outer)

    def gradient(kind: torch.dtype) -> dict:
        x = both.to(kind).requires_grad_()
        gate, up = x.chunk(2, dim=1)
        (found,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, (x,), d.to(kind))
        return {"dgate, dup": found}

    def verify() -> check.Verdict:
        ours = {"dgate, dup": kernel(d, both, "silu")[0]}
        return check.compare(ours, gradient(dtype), gradient(maths.wider(dtype)), dtype)

    moved = 6 * d.numel() * d.element_size()
    return Case(COPY, {COPY: copy_of(moved, device), OURS: lambda: kernel(d, both, "silu", emit=True)}, verify, bytes_moved=moved)


def cross_entropy(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Row losses, and the gradient in the logits' place: rows are too long to be held, so they are read twice and written once."""
    from fastlora.kernels.cross_entropy import cross_entropy_

    logits = draw(device, dtype, size.tokens, size.outer)
    labels = torch.randint(0, size.outer, (size.tokens,), device=device)

    def verify() -> check.Verdict:
        rows = logits[:128].clone().normal_()
        own, wide = rows.clone(), rows.to(maths.wider(dtype)).requires_grad_()
        cross_entropy_(own, labels[:128], gradient=True)
        torch.nn.functional.cross_entropy(wide, labels[:128], reduction="sum").backward()
        return check.compare({"gradient": own}, {"gradient": wide.grad.to(dtype)}, {"gradient": wide.grad}, dtype)

    moved = 3 * logits.numel() * logits.element_size()
    calls = {COPY: copy_of(moved, device), OURS: lambda: cross_entropy_(logits, labels, gradient=True)}
    return Case(COPY, calls, verify, bytes_moved=moved)


def attention(size: Size, device: str, dtype: torch.dtype) -> Case:
    """Causal attention inside documents, forward and backward, against torch's on the same documents as rows of a batch."""
    from fastlora.ops.attention import attention as own_attention

    length = int(size.name.rpartition("x")[2])
    rows, scale = size.tokens // length, size.head_dim**-0.5
    spans = tuple((i * length, (i + 1) * length) for i in range(rows))
    q, k, v = (draw(device, dtype, 1, h, size.tokens, size.head_dim) for h in (size.heads, size.key_heads, size.key_heads))
    dout = draw(device, dtype, 1, size.tokens, size.heads, size.head_dim)

    def ours() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return list(torch.autograd.grad(own_attention(*leaves, spans, scale), leaves, dout))

    def theirs(kind: torch.dtype, backend=None) -> list[torch.Tensor]:
        leaves = [t.to(kind).view(t.shape[1], rows, length, -1).transpose(0, 1).detach().requires_grad_() for t in (q, k, v)]
        upstream = dout.to(kind).view(rows, length, size.heads, -1).transpose(1, 2)
        if backend is None:
            out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
        else:
            with torch.nn.attention.sdpa_kernel(backend):
                out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
        found = torch.autograd.grad(out, leaves, upstream)
        return [g.transpose(0, 1).reshape(1, g.shape[1], size.tokens, -1) for g in found]

    def verify() -> check.Verdict:
        ours_, eager, wide = (dict(zip("qkv", t)) for t in (ours(), theirs(dtype), theirs(maths.wider(dtype))))
        return check.compare(ours_, eager, wide, dtype)

    calls = {SDPA: lambda: theirs(dtype), OURS: ours}
    if device == "cuda":
        calls["cudnn"] = lambda: theirs(dtype, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    return Case(SDPA, calls, verify)


def _low(which: str):
    return lambda size, device, dtype: low_rank(size, device, dtype, which)


# name: (how it is made, its list of sizes, systems, whether a CPU can run it)
KERNELS = {
    "gemm-forward": (gemm_forward, "product", (OURS, "fastlora-r0"), True),
    "gemm-dx": (gemm_dx, "product", (OURS,), True),
    "s": (_low("s"), "low", (OURS,), False),
    "ds-db": (_low("ds-db"), "low", (OURS,), False),
    "da": (_low("da"), "low", (OURS,), False),
    "norm-forward": (norm_forward, "row", (OURS,), True),
    "norm-backward": (norm_backward, "row", (OURS,), False),
    "rope": (rope, "row", (OURS,), False),
    "glu-forward": (glu_forward, "row", (OURS,), True),
    "glu-backward": (glu_backward, "row", (OURS,), False),
    "cross-entropy": (cross_entropy, "loss", (OURS,), False),
    "attention": (attention, "attention", (OURS, "cudnn"), True),
}


def all_cases(device: str) -> list[tuple[str, Size, str]]:
    """(kernel, size, system) of every test on this device."""
    found = []
    for name, (_, sizes, names, on_cpu) in KERNELS.items():
        if device == "cpu" and not on_cpu:
            continue
        usable = [s for s in names if device == "cuda" or s == OURS]
        found += [(name, size, system) for size in SIZES[device][sizes] for system in usable]
    return found


def make(name: str, size: Size, device: str, dtype: torch.dtype) -> Case:
    """The case of a kernel."""
    return KERNELS[name][0](size, device, dtype)



