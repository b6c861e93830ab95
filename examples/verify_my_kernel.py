"""Verify a LoRA kernel of your own: copy this file and put your kernel in place of ``MyLinear``.

    python examples/verify_my_kernel.py
    python -m verify --subject examples.verify_my_kernel:SUBJECT --claim accuracy --cases 40
    pytest examples/verify_my_kernel.py
"""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from verify import runner, terminal
from verify.graphs import Roundings
from verify.simple import FunctionLinear, Operations, block
from verify.subject import ROW, Subject


class MyLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T + bias with a backward written by hand; s is folded into x A^T."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, bias):
        s = x @ a.T * scale
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, s)
        return torch.nn.functional.linear(x, weight, bias) + s @ b.T

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s = ctx.saved_tensors
        ds = dy @ b * ctx.scale
        return dy @ weight + ds @ a, None, ds.T @ x, dy.T @ s, None, None


def my_gate(x, lengths, seed):
    """A row-wise block: SiLU of one half of the columns times the other."""
    gate, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


# Where it rounds: here every intermediate is stored in the working dtype, which is what is assumed of a kernel that
# says nothing. A fused kernel with fp32 accumulators would declare ``Roundings.fused``, and be held to that.
linear = FunctionLinear(MyLinear.apply, dtypes=(torch.float32, torch.bfloat16), roundings=Roundings.everywhere)
SUBJECT = Subject("my kernel", "cpu", linear, operations=Operations((block("my gate", 64, 32, my_gate, ROW),)))


@pytest.mark.parametrize("claim", ["accuracy", "splits", "updates"])
def test_my_kernel(verify_claim, claim):
    verify_claim(SUBJECT, claim, cases=10)


if __name__ == "__main__":
    found = runner.run_claims([SUBJECT], ["accuracy", "splits"], seconds=None, cases=10, seed=0, after_each=lambda _: None)
    terminal.print_claims(Console(), found)
