"""The small linears are captured as CUDA graphs, exact sums among them, and their replays write what the calls wrote."""

from __future__ import annotations

import pytest
import torch

from bench import block_cases, graphs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [s for s in block_cases.SIZES["cuda"]["small"] if s.tokens in (128, 1024)], ids=str)
def test_every_call_of_the_small_linear_is_captured(size):
    case = block_cases.make("small-linear", size, "cuda", torch.bfloat16)
    for name in ("fastlora", "fastlora-float", "peft"):
        replay, written = graphs.record(_warmed(case.calls[name]))
        for tensor in written:
            tensor.fill_(float("nan"))
        replay()
        assert all(bool(t.isfinite().all()) and bool(t.any()) for t in written), name
        assert callable(graphs.captured(case.calls[name]))
    case.close()


def _warmed(call):
    graphs._warm(call)
    return call
