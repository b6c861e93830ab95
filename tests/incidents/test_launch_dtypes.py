"""A binary looked up by the first argument's dtype alone.

The reduction of dS reads fp32 partials and writes 16-bit dS. Its launches were keyed by the first argument, fp32 in both cases, so after a
bf16 layer a fp16 layer got the bf16 binary, which wrote bf16 bits into a fp16 tensor: gradients of A were NaN. Found by
`python -m verify --claim splits` on a GPU, 2026-11-24. The key holds every tensor's dtype now.
"""

from __future__ import annotations

import types

import pytest
import torch

from fastlora.kernels import launch
from fastlora.kernels.tables import Tile


class Recorder:
    """Stands for a kernel: remembers what was compiled for which output dtype."""

    arg_names = ("p_in", "p_out", "N")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def first_launch(p_in, p_out, **constants):
            self.compiled.append(p_out.dtype)
            return types.SimpleNamespace(run=lambda *arguments: None, function=None, packed_metadata=None)

        return first_launch


@pytest.mark.gpu
def test_run_compiles_again_for_another_output_dtype():
    kernel = Recorder()
    part = torch.zeros(4, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        launch.run(kernel, (1,), Tile(1), part, torch.zeros(4, device="cuda", dtype=dtype), N=4)
    assert kernel.compiled == [torch.bfloat16, torch.float16]


@pytest.mark.gpu
def test_lora_linear_in_one_dtype_after_the_other():
    from fastlora.ops.lora_linear import lora_linear

    for dtype in (torch.bfloat16, torch.float16):
        g = torch.Generator("cuda").manual_seed(0)
        x, weight = (torch.randn(*s, generator=g, device="cuda").to(dtype) for s in ((130, 64), (31, 64)))
        a, b = (torch.randn(*s, generator=g, device="cuda").requires_grad_() for s in ((8, 64), (31, 8)))
        lora_linear(x, weight, a, b, 1.0).float().sum().backward()
        assert torch.isfinite(a.grad).all() and a.grad.abs().max() < 1e4
