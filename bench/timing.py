"""Interleaved timing in one process: every time that this suite reports is taken here.

Calls take turns, each turn in an order of its own, so that no call is always measured after the same other one, whose power draw decides
the clock that it starts with. A sample repeats its call until it holds at least 20 ms of work (CUDA events on a GPU, ``perf_counter``
elsewhere); medians come with quantiles; the baseline runs a second time under another name (the A/A control), whose ratio to itself says
what the machine's noise is. Beside every time stands the most memory that one call needed, by torch's counters (there are none on a CPU).
"""

from __future__ import annotations

import collections
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

WORK_MS = 20.0
SAMPLES = {"cuda": 21, "cpu": 5}
AGAIN = " again"
# Quantiles that a median is reported with, and those between which the control's ratio has to hold 1.
LOW, HIGH = 0.2, 0.8
SPREAD = (0.05, 0.95)

Call = Callable[[], object]


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of ``values`` at ``share`` (0 to 1), linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Timing:
    """Times of one call.

    Attributes:
        samples: milliseconds a call, one value a sample, in the order taken.
        repeats: calls a sample.
        peak_bytes: the most memory allocated during one call beyond what was allocated before it; None without a GPU.
    """

    samples: tuple[float, ...]
    repeats: int
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.samples)

    def as_dict(self) -> dict:
        """For JSON: the median with quantiles, the samples, the shortest sample's length, and memory."""
        return {
            "median_ms": self.median, "low_ms": quantile(self.samples, LOW), "high_ms": quantile(self.samples, HIGH),
            "samples_ms": list(self.samples), "repeats": self.repeats,
            "shortest_sample_ms": min(self.samples) * self.repeats, "peak_bytes": self.peak_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """One call's time over another's, sample by sample of the same turn."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the turns' ratios."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The quantiles between which nearly all turns lie."""
        return quantile(self.values, SPREAD[0]), quantile(self.values, SPREAD[1])

    @property
    def holds_one(self) -> bool:
        """Whether 1 lies within the spread: what an A/A control has to show."""
        low, high = self.spread
        return low <= 1.0 <= high

    def as_dict(self) -> dict:
        """For JSON."""
        return {"median": self.median, "low": quantile(self.values, LOW), "high": quantile(self.values, HIGH)}


def ratio(top: Timing, base: Timing) -> Ratio:
    """``top`` over ``base``; both of one :func:`interleaved`."""
    return Ratio(tuple(t / b for t, b in zip(top.samples, base.samples, strict=True)))


def control(taken: Mapping[str, Timing], base: str) -> Ratio:
    """The A/A control: the baseline's second run over its first."""
    return ratio(taken[base + AGAIN], taken[base])


def control_dict(found: Ratio) -> dict:
    """For JSON: the control with its spread and its verdict."""
    return found.as_dict() | {"spread": list(found.spread), "holds_one": found.holds_one}


def device_type(device: torch.device | str | None = None) -> str:
    """"cuda" or "cpu": of ``device``, or of this machine."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_clock() -> float:
    """Seconds, after everything launched on the GPU has ended: a timer for pytest-benchmark."""
    synchronize()
    return time.perf_counter()


def _sample_host(call: Call, repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) * 1e3 / repeats


def _sample_cuda(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def peak_memory(call: Call, device: torch.device | str) -> int | None:
    """Bytes that one call allocates at most beyond what was allocated before it; None on a CPU, which torch does not count."""
    if device_type(device) != "cuda":
        call()
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def interleaved(
    calls: Mapping[str, Call], device: torch.device | str, *, base: str | None = None, samples: int | None = None,
    work_ms: float = WORK_MS, warm_up: int = 3,
) -> dict[str, Timing]:
    """Time ``calls`` in turns.

    Args:
        calls: what to time, by name; each leaves things as it found them.
        device: where they run: decides the clock.
        base: the baseline, which is timed a second time as "<base> again"; None: no control.
        samples: of each call; None: 21 on a GPU, 5 on a CPU.
        work_ms: least milliseconds a sample.
        warm_up: calls of each before anything is timed, at least 1; memory is taken at the last of them.

    Raises:
        ValueError: ``base`` is not among the calls, or a count below 1.
    """
    if base is not None and base not in calls:
        raise ValueError(f"base: {base!r} is not among the calls; allowed: {', '.join(calls)}")
    kind = device_type(device)
    samples = SAMPLES.get(kind, SAMPLES["cpu"]) if samples is None else samples
    if samples < 1 or warm_up < 1:
        raise ValueError(f"samples = {samples}, warm_up = {warm_up}: allowed is 1 or more")
    sample = _sample_cuda if kind == "cuda" else _sample_host
    repeats, peaks = {}, {}
    for name, call in calls.items():
        for _ in range(warm_up - 1):
            call()
        peaks[name] = peak_memory(call, device)
        repeats[name] = _repeats(sample, call, work_ms)
    todo = dict(calls)
    if base is not None:
        again = base + AGAIN
        todo[again], repeats[again], peaks[again] = calls[base], repeats[base], peaks[base]
    taken: dict[str, list[float]] = {name: [] for name in todo}
    orders = random.Random(0)  # the same ones in every run
    for _ in range(samples):
        for name in orders.sample(list(todo), len(todo)):
            taken[name].append(sample(todo[name], repeats[name]))
    return {name: Timing(tuple(values), repeats[name], peaks[name]) for name, values in taken.items()}


def _repeats(sample, call: Call, work_ms: float) -> int:
    """Calls that hold ``work_ms`` of work; short calls are looked at in a longer run, whose calls cost less."""
    took, repeats = sample(call, 1), 1
    while took * repeats < work_ms:
        repeats = max(repeats + 1, math.ceil(1.1 * work_ms / max(took, 1e-4)))
        took = sample(call, repeats)
    return repeats


def launches(call: Call) -> collections.Counter[str]:
    """Kernels that one call runs on the GPU, by name, copies and fills included; empty without a GPU."""
    if not torch.cuda.is_available():
        return collections.Counter()
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return collections.Counter(e.name for e in seen.events() if e.device_type == DeviceType.CUDA)
