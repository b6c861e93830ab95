"""The non-exact configuration's attention by torch's own mathematics, where no cuDNN is, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from bench import nonexact
from fastlora.errors import InputError
from fastlora.stream import Stream

HEADS, KEY_HEADS, LENGTH, SIZE = 4, 2, 24, 8


def plain(q, k, v):
    """Causal attention [heads, L, D] of one document, written out."""
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 0) for t in (k, v))
    scores = (q @ k.transpose(1, 2) * 0.5).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("count", [2, 1], ids=["right", "a document sees the one before"])
def test_attention_is_that_of_each_document(count):
    draw = torch.Generator().manual_seed(0)
    # As the decoder layer has them: heads side by side in one buffer, gradients written into views of another.
    buffer, into = (torch.randn(2 * LENGTH, (HEADS + 2 * KEY_HEADS) * SIZE, generator=draw, dtype=torch.float64) for _ in range(2))
    parts = [
        t.unflatten(1, (-1, SIZE)).transpose(0, 1).split([HEADS, KEY_HEADS, KEY_HEADS]) for t in (buffer, into)
    ]  # fmt: skip
    dout = torch.randn(2 * LENGTH, HEADS, SIZE, generator=draw, dtype=torch.float64)
    forward, backward = nonexact._attention(count)
    out, kept = forward(*parts[0], None, 0.5)
    backward(dout, *parts[0], out, kept, None, 0.5, into=parts[1])

    wanted = [t.detach().clone().requires_grad_() for t in parts[0]]
    documents = [plain(*(t[:, at : at + LENGTH] for t in wanted)) for at in (0, LENGTH)]
    expected = torch.cat(documents, 1).transpose(0, 1)
    gradients = torch.autograd.grad(expected, wanted, dout)
    pairs = zip((out, *parts[1]), (expected, *gradients), strict=True)
    right = [torch.allclose(*pair) for pair in pairs]  # tolerance-rule: float64 on both sides; the planted fault is of size 1
    assert right == [count == 2] * 4


def test_attention_refuses_windows_and_soft_caps():
    t = torch.zeros(1, 4, 2)
    for rule in ({"window": 2}, {"softcap": 1.0}):
        with pytest.raises(InputError, match="plain causal attention"):
            nonexact._attention(1)[0](t, t, t, None, 1.0, **rule)


def test_active_refuses_documents_of_several_lengths_and_puts_everything_back():
    layer = pytest.importorskip("fastlora.ops.decoder_layer", reason="needs Triton")
    before = layer.attention_forward
    with pytest.raises(InputError, match="documents of 64, 128 tokens"), nonexact.active(Stream((70, 33), 64, (1, 2))):
        pass
    with pytest.raises(ZeroDivisionError), nonexact.active(Stream((70, 70), 64, (1, 2))):
        assert layer.attention_forward is not before
        raise ZeroDivisionError
    assert layer.attention_forward is before
