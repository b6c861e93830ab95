"""A case of the kernel or block level: a baseline, the systems held against it, and the check that comes first."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench import graphs, timing
from bench.check import Verdict
from fastlora.ops import backend

OURS = "fastlora"
NO_GPU = "no GPU: CPU sizes through the torch reference path; these times say nothing about the kernels"


@dataclass(frozen=True)
class Size:
    """Sizes of a case: M tokens, K inner and N outer features, rank, heads."""

    name: str
    tokens: int
    inner: int
    outer: int
    rank: int = 16
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return self.name


@dataclass
class Case:
    """What is timed.

    Attributes:
        base: the baseline's name among ``calls``.
        calls: by system; each is forward and backward (block level) or one kernel.
        check: the verification of our calls, run before any of them is timed.
        bytes_moved: of one call, for kernels that are bound by memory.
        flops: of one call, for products.
        tokens: M, where a table asks for it.
        graphs: also time the calls as CUDA graphs, which leaves out the host; each then returns tensors that it wrote.
        notes: what a reader has to know.
    """

    base: str
    calls: dict[str, timing.Call]
    check: Callable[[], Verdict]
    bytes_moved: int | None = None
    flops: int | None = None
    tokens: int | None = None
    graphs: bool = False
    notes: list[str] = field(default_factory=list)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Let go of everything on the device."""
        self.stack.close()
        self.calls = {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kernels_run(device: str, dtype: torch.dtype) -> bool:
    """Whether the library's kernels run there: on a GPU that has a tile table, or in the interpreter where a test forces them."""
    return backend.explain(torch.device(device, 0) if device == "cuda" else torch.device(device), dtype)[0] == "triton"


def draw(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal values; zeros would cost less power and run faster."""
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(scale).to(dtype)


def measure(benchmark, case: Case, system: str, device: str) -> None:
    """Verify, time the system in turns with the baseline and its A/A control, then hand it to pytest-benchmark.

    pytest-benchmark's own statistics are those of the system alone (they are what ``--benchmark-compare-fail`` reads); the ratios,
    memory and the control stand in ``extra_info``.
    """
    import pytest

    worst = None
    if system.startswith(OURS):
        verdict = case.check()
        worst = verdict.worst
        if not verdict.passed:
            pytest.fail(f"not timed, it fails verification: {verdict.reason}")
    call = case.calls[system]
    if not benchmark.enabled:
        benchmark.pedantic(call)
        return
    taken = timing.interleaved({case.base: case.calls[case.base], system: call}, device, base=case.base)
    own, base = taken[system], taken[case.base]
    extra = {
        "system": system, "baseline": case.base, "time": own.as_dict(), "baseline_time": base.as_dict(),
        "over_baseline": timing.ratio(own, base).as_dict(),
        "control": timing.control_dict(timing.control(taken, case.base)), "peak_bytes": own.peak_bytes,
        "baseline_peak_bytes": base.peak_bytes, "verified_worst_share": worst, "notes": list(case.notes),
    }  # fmt: skip
    if device == "cpu":
        extra["notes"].append(NO_GPU)
    if case.bytes_moved:
        extra["gigabytes_per_second"] = case.bytes_moved / own.median * 1e-6
    if case.flops:
        extra["teraflops"] = case.flops / own.median * 1e-9
    if case.tokens:
        extra["tokens"] = case.tokens
    if case.graphs:
        extra["graph"] = graphs.compare(case.calls, case.base, system, device)
    benchmark.extra_info.update(extra)
    benchmark.pedantic(call, rounds=len(own.samples), iterations=own.repeats)
