"""The warp-specialised kernels of attention have the bits of the portable ones, for every cut into documents, and compile nothing for a new one."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import attention as file
from fastlora.kernels import attention_specialized, attention_specialized_keys
from fastlora.ops.attention_triton import document_edges
from tests.attention_cases import draw, spans_of
from tests.gpu_marks import HOPPER

pytestmark = HOPPER

# Documents' lengths: one block, an odd number of blocks, neighbours in one pair of blocks, a long one between short ones, many of one
# length, and more tiles than a grid has programs.
LENGTHS = [(64,), (192,), (64, 64, 64), (64, 192, 2048, 640, 64, 128, 1024, 832, 1088), (256,) * 16, (2048,) * 4]
# Heads, key heads, head width.
SIZES = [(32, 8, 128), (4, 2, 64), (6, 1, 128)]


def both(size, lengths, dtype):
    """(out, lse, dq, dk, dv) of one draw."""
    heads, key_heads, width = size
    q, k, v, dout = draw((heads, key_heads, width, width, lengths, None, None), dtype, "cuda")
    # as the fused layer holds them: columns of one buffer
    tokens = q.shape[2]
    buffer = torch.cat([t[0].transpose(0, 1).reshape(tokens, -1) for t in (q, k, v)], 1)
    views, at = [], 0
    for count in (heads, key_heads, key_heads):
        views.append(buffer[:, at : at + count * width].view(tokens, count, width).transpose(0, 1))
        at += count * width
    # short documents too, which the library leaves to the portable kernels
    edges, scale = document_edges(spans_of(lengths), q.device)._replace(short=False), width**-0.5
    out, lse = file.attention_forward(*views, edges, scale)
    return out, lse, *file.attention_backward(dout[0], *views, out, lse, edges, scale)


@pytest.fixture
def used(monkeypatch):
    """The calls of the specialised kernels, and whether they ran."""
    seen = []
    for module, name in (
        (attention_specialized, "forward"), (attention_specialized, "backward_dq"), (attention_specialized_keys, "backward_dkv"),
    ):  # fmt: skip
        def spy(*arguments, call=getattr(module, name), name=name):  # noqa: B008
            seen.append((name, call(*arguments)))
            return seen[-1][1]

        monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_specialised_attention_has_the_portable_bits(size, lengths, dtype, used, monkeypatch):
    ours = [both(size, lengths, dtype) for _ in range(3)]
    assert used == [("forward", True), ("backward_dq", True), ("backward_dkv", True)] * 3
    monkeypatch.setattr(attention_specialized, "serves", lambda *arguments: False)
    theirs = both(size, lengths, dtype)
    assert len(used) == 9
    for one in ours:
        for name, mine, other in zip(("out", "lse", "dq", "dk", "dv"), one, theirs):
            assert torch.equal(mine, other), name


def test_specialised_attention_compiles_nothing_for_other_documents(used):
    kernels = (
        attention_specialized.forward_specialized_kernel, attention_specialized.dq_specialized_kernel,
        attention_specialized_keys.dkv_specialized_kernel,
    )  # fmt: skip
    both(SIZES[0], (128,), torch.bfloat16)
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for lengths in ((64, 320), (192,) * 7, (1024, 64)):
        both(SIZES[0], lengths, torch.bfloat16)
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels] == before
