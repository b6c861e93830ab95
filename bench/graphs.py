"""Calls captured as CUDA graphs: a replay takes the GPU's time and none of the host's.

What a call makes once (binaries, tables of chunks, workspaces of cuBLAS) is made by calls before the capture, on a side stream. A graph
that had recorded nothing would be fast, so a replay has to write what the call itself gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from bench import timing

NO_GPU = "not tried: no GPU"
SAMPLES = 9
WARM_UP = 3
# A replay may round as another algorithm of cuBLAS does; one that ran nothing is off by everything.
SLACK = 2.0**-6

Tensors = Callable[[], Sequence[torch.Tensor]]


def record(call: Tensors) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """(replay, what each replay writes) of the call's kernels, forward and backward.

    Raises:
        RuntimeError: something in the call cannot be captured: it waits for the GPU, or copies from memory that is not pinned.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # detached at once: the autograd graph would keep nodes that belong to the capture's stream
        written = [t.detach() for t in call()]
    return graph.replay, written


def _warm(call: Tensors) -> list[torch.Tensor]:
    """Copies of what the call gives, after it ran a few times on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            wanted = [t.detach().clone() for t in call()]
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return wanted


def captured(call: Tensors, *, warm=_warm, recorder=record) -> Callable[[], None]:
    """A callable that replays ``call``.

    Args:
        call: forward and backward on inputs that stay where they are; it drops old gradients first and returns tensors that it wrote.
        warm, recorder: the two parts that need a GPU.

    Raises:
        RuntimeError: the call cannot be captured, returns nothing, or its replay does not write what it wrote.
    """
    wanted = warm(call)
    if not wanted:
        raise RuntimeError("the call returns no tensors, so its replay cannot be checked")
    replay, written = recorder(call)
    for tensor in written:
        tensor.fill_(float("nan"))
    replay()
    for index, (found, expected) in enumerate(zip(written, wanted, strict=True)):
        off, size = float((found.double() - expected.double()).norm()), float(expected.double().norm())
        if not off <= SLACK * size:
            raise RuntimeError(f"a replay does not write what the call does: tensor {index} is off by {off:.3g}, norm {size:.3g}")
    return replay


def compare(calls: Mapping[str, Tensors], base: str, system: str, device: str, *, capture=captured, samples: int = SAMPLES) -> dict:
    """For JSON: ``system`` over ``base`` by replays in turns, with medians and the A/A control; or ``not_timed`` and the reason."""
    if device != "cuda":
        return {"not_timed": NO_GPU}
    graphs = {}
    for name in (base, system):
        try:
            graphs[name] = capture(calls[name])
        except RuntimeError as error:
            return {"not_timed": f"{name}: {' '.join(str(error).split())[:200]}"}
    return ratios(timing.interleaved(graphs, device, base=base, samples=samples), base, system)


def ratios(taken: Mapping[str, timing.Timing], base: str, system: str) -> dict:
    """For JSON, of one :func:`timing.interleaved`."""
    return {
        "time": taken[system].as_dict(), "baseline_time": taken[base].as_dict(),
        "over_baseline": timing.ratio(taken[system], taken[base]).as_dict(),
        "control": timing.control_dict(timing.control(taken, base)),
    }  # fmt: skip
