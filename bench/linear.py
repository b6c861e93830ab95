"""A first timing of the LoRA linear on a GPU: forward + backward over the same layer frozen, interleaved in one process."""

from __future__ import annotations

import json
import math
import statistics

import torch

from bench.provenance import provenance
from fastlora.exact import TokenSum
from fastlora.files import atomic_write_text
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.lora_linear import lora_linear


def interleaved(calls: dict, samples: int = 15, work_ms: float = 20.0) -> dict[str, list[float]]:
    """Milliseconds a call, ``samples`` of each, taken in turns; a sample repeats its call for at least ``work_ms``."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(call, repeats):
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats

    repeats = {}
    for name, call in calls.items():
        once(call, 3)
        repeats[name] = max(1, math.ceil(work_ms / once(call, 3)))
    taken = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            taken[name].append(once(call, repeats[name]))
    return taken


def linear_cases(tokens: int, inner: int, outer: int, rank: int) -> dict:
    """Frozen, frozen again (the A/A control), PEFT's maths, fastlora with fp32 sums and with exact sums."""

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, dy = draw(tokens, inner).requires_grad_(), draw(tokens, outer)
    weight = draw(outer, inner) / inner**0.5
    a = (torch.randn(rank, inner, device="cuda") / inner**0.5).requires_grad_()
    b = (torch.randn(outer, rank, device="cuda") / rank**0.5).requires_grad_()
    a16, b16 = a.detach().bfloat16().requires_grad_(), b.detach().bfloat16().requires_grad_()
    sums = (TokenSum(a.shape, "cuda"), TokenSum(b.shape, "cuda"))
    f = torch.nn.functional.linear

    def clear():
        x.grad = a.grad = b.grad = a16.grad = b16.grad = None

    def frozen():
        clear()
        f(x, weight).backward(dy)

    def peft_maths():
        clear()
        (f(x, weight) + f(f(x, a16), b16) * 2.0).backward(dy)

    def ours():
        clear()
        lora_linear(x, weight, a, b, 2.0).backward(dy)

    def exact():
        clear()
        lora_linear(x, weight, a, b, 2.0, sums=sums).backward(dy)

    def dropout():
        clear()
        lora_linear(x, weight, a, b, 2.0, sums=sums, dropout=0.1, key=key).backward(dy)

    key = DropoutKey(2**61 + 1, torch.arange(tokens, device="cuda"))
    return {"frozen": frozen, "frozen again": frozen, "peft maths": peft_maths, "fastlora": ours, "exact": exact,
            "exact dropout 0.1": dropout}  # fmt: skip


def main(path: str | None = None) -> None:
    """Time a few shapes; print ratios to the frozen layer; write JSON if a path is given."""
    rows = []
    for tokens, inner, outer, rank in (
        (8192, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16),
        (8192, 576, 1536, 16), (1024, 576, 1536, 16),
    ):  # fmt: skip
        taken = interleaved(linear_cases(tokens, inner, outer, rank))
        base = statistics.median(taken["frozen"])
        ratios = {name: statistics.median(values) / base for name, values in taken.items()}
        rows.append({"tokens": tokens, "inner": inner, "outer": outer, "rank": rank, "frozen_ms": base, "ratios": ratios,
                     "quantiles": {n: statistics.quantiles(v, n=5) for n, v in taken.items()}})  # fmt: skip
        print(f"M={tokens} K={inner} N={outer} r={rank} frozen {base:.3f} ms " +
              " ".join(f"{n} {r:.3f}x" for n, r in ratios.items()), flush=True)  # fmt: skip
    if path is not None:
        atomic_write_text(path, json.dumps({"provenance": provenance(), "linear": rows}, indent=1) + "\n")
