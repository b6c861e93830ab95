"""The LoRA linear's kernels on a GPU: against the fp64 maths, for every cut, for every length, under torch.compile."""

from __future__ import annotations

import pytest
import torch

from fastlora.exact import TokenSum
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.reference import backward_ref, forward_ref

pytestmark = pytest.mark.gpu

# tokens, K, N, rank, dropout, bias
CASES = [
    (1, 64, 48, 1, 0.0, True),
    (37, 129, 257, 3, 0.1, False),
    (300, 576, 1536, 16, 0.0, False),
    (512, 576, 192, 20, 0.25, True),
    (1000, 1536, 576, 64, 0.1, False),
    (257, 512, 520, 256, 0.0, False),
    (0, 64, 64, 4, 0.0, False),
]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def ids(case):
    return "M{}-K{}-N{}-r{}-p{}-bias{:d}".format(*case)


def make(case, dtype, seed=0):
    tokens, inner, outer, rank, dropout, bias = case
    g = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    x = draw(tokens, inner).to(dtype)
    weight = (draw(outer, inner) / inner**0.5).to(dtype)
    a, b = draw(rank, inner) / inner**0.5, draw(outer, rank) / rank**0.5
    key = DropoutKey(2**61 + 99, torch.arange(tokens, device="cuda") * 2**33 + 5) if dropout else None
    return x, weight, a, b, draw(tokens, outer).to(dtype), draw(outer).to(dtype) if bias else None, dropout, key


@pytest.mark.parametrize("dtype", list(UNIT), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_lora_linear_matches_reference(case, dtype):
    """Each result differs from the reference's by at most a few roundings of its own dtype and the order of fp32 sums."""
    x, weight, a, b, dy, bias, dropout, key = make(case, dtype)
    x = x.requires_grad_()
    a, b = a.requires_grad_(), b.requires_grad_()
    y = lora_linear(x, weight, a, b, 1.5, bias, dropout=dropout, key=key)
    y.backward(dy)
    with torch.no_grad():
        ry, rs = forward_ref(x, weight, a, b, 1.5, bias, dropout, key)
        rdx, rda, rdb = backward_ref(dy, x, weight, a, b, rs, 1.5, dropout, key)
    terms = max(case[:4])
    for ours, theirs in ((y, ry), (x.grad, rdx), (a.grad, rda), (b.grad, rdb)):
        assert ours.shape == theirs.shape and not torch.isnan(ours).any()
        if ours.numel():
            scale = max(theirs.abs().max().item(), 1.0)
            assert (ours.float() - theirs.float()).abs().max().item() <= 8 * scale * (UNIT[dtype] + terms * 2.0**-24)


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_linear_exact_sums_equal_for_every_cut(rank, dropout):
    """Rows, dX and integer sums do not depend on the cut; fp32 sums do, which shows that the cuts differ."""
    x, weight, a, b, dy, _, _, key = make((2048, 576, 1536, rank, 0.1, False), torch.bfloat16)
    seen, floats = set(), set()
    for cuts in ([2048], [128] * 16, [1024, 1024], [384, 128, 1536], [256, 640, 1152]):
        sums = (TokenSum(a.shape, "cuda"), TokenSum(b.shape, "cuda"))
        af, bf = a.clone().requires_grad_(), b.clone().requires_grad_()
        parts, start = [], 0
        for size in cuts:
            rows = slice(start, start + size)
            k = DropoutKey(key.seed, key.tokens[rows])
            xs = x[rows].clone().requires_grad_()
            y = lora_linear(xs, weight, a, b, 2.0, dropout=dropout, key=k, sums=sums)
            y.backward(dy[rows])
            parts.append((y.detach(), xs.grad))
            lora_linear(x[rows], weight, af, bf, 2.0, dropout=dropout, key=k).backward(dy[rows])
            start += size
        sums[0].check("a")
        sums[1].check("b")
        state = [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), sums[0].total, sums[1].total]
        seen.add(tuple(hash(t.cpu().view(torch.uint8).numpy().tobytes()) for t in state))
        floats.add(hash(bf.grad.cpu().numpy().tobytes()))
    assert len(seen) == 1
    assert len(floats) > 1


def test_lora_linear_compiles_a_kernel_a_width_of_the_product_and_nothing_for_a_new_length():
    from fastlora.kernels import gemm, gemm_beside, gemm_specialized, project, token_sum

    kernels = (
        gemm.gemm_kernel, gemm.gemm_tma_kernel, gemm_specialized.gemm_specialized_kernel, gemm_beside.gemm_beside_kernel,
        project.project_kernel, token_sum.token_sum_kernel, token_sum.reduce_ds_kernel,
    )  # fmt: skip

    def binaries():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def step(tokens):
        x, weight, a, b, dy, *_ = make((tokens, 576, 1536, 16, 0.0, False), torch.bfloat16)
        sums = (TokenSum(a.shape, "cuda"), TokenSum(b.shape, "cuda"))
        y = lora_linear(x.requires_grad_(), weight, a, b, 2.0, sums=sums)
        y.backward(dy)

    # on compute capability 9.0 the product's tile is narrower for few tokens, three widths at most, and S or dS is made in its launch where
    # the widest leaves multiprocessors idle: of an H200's 132 at 5,000 and 8,192 tokens
    for tokens in (256, 1024, 2048, 5000, 8192, 16384):
        step(tokens)
    before = binaries()
    for tokens in (1, 16, 17, 128, 333, 1536, 4900, 8100, 12000):
        step(tokens)
    assert binaries() == before and before > 0


@pytest.mark.parametrize("tokens", [1, 100, 128, 300, 1000])
def test_lora_linear_rows_do_not_depend_on_the_count(tokens):
    x, weight, a, b, dy, *_ = make((4096, 576, 1536, 16, 0.0, False), torch.bfloat16)

    def rows(count):
        xs = x[:count].clone().requires_grad_()
        y = lora_linear(xs, weight, a, b, 2.0)
        y.backward(dy[:count])
        return y.detach()[:tokens], xs.grad[:tokens]

    for ours, theirs in zip(rows(tokens), rows(4096)):
        assert torch.equal(ours, theirs)


def test_lora_linear_names_the_broken_chunk():
    x, weight, a, b, dy, *_ = make((1024, 576, 192, 16, 0.0, False), torch.bfloat16)
    dy[700, 3] = float("nan")
    sums = (TokenSum(a.shape, "cuda"), TokenSum(b.shape, "cuda"))
    lora_linear(x.requires_grad_(), weight, a, b, 2.0, sums=sums).backward(dy)
    assert sums[1].stats[0].item() == 700 // 128
    with pytest.raises(RuntimeError, match="layer7"):
        sums[1].check("layer7")


def test_lora_linear_under_torch_compile_has_no_break():
    x, weight, a, b, dy, bias, *_ = make((200, 128, 192, 16, 0.0, True), torch.bfloat16)
    a, b = a.requires_grad_(), b.requires_grad_()
    y = torch.compile(lambda x: lora_linear(x, weight, a, b, 2.0, bias).sin(), fullgraph=True)(x)
    y.backward(dy)
    grads = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    lora_linear(x, weight, a, b, 2.0, bias).sin().backward(dy)
    for ours, theirs in zip(grads, (a.grad, b.grad)):
        # sin and cos are fused by the compiler and may round otherwise: one rounding of dY each
        assert (ours - theirs).abs().max() <= 2 * UNIT[torch.bfloat16] * 200 * theirs.abs().max()


def test_lora_linear_passes_opcheck():
    x, weight, a, b, dy, bias, *_ = make((40, 64, 48, 16, 0.0, True), torch.bfloat16)
    x, a, b = x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    arguments = (x, weight, a, b, 2.0, bias, 0.0, 0, None)
    assert set(torch.library.opcheck(torch.ops.fastlora.lora_linear.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_lora_linear_takes_any_strides(layout):
    base, weight, a, b, *_ = make((64, 576, 192, 16, 0.0, False), torch.bfloat16)
    if layout == "transposed":
        x = base.t().contiguous().t()
    elif layout == "sliced":
        x = torch.cat([base, base], 1)[:, :576]
    else:
        x = torch.cat([base.flatten()[:1], base.flatten()])[1:].view(64, 576)
    assert torch.equal(lora_linear(x, weight, a, b, 2.0), lora_linear(base, weight, a, b, 2.0))
