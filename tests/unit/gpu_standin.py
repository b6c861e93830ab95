"""A GPU for kept launches, on a machine without one: its tensors, its device and its stream."""

from __future__ import annotations

import contextlib
import types

import torch
import triton

from fastlora.kernels import launch


class OnGpu(torch.Tensor):
    """A tensor of the host that says it is a GPU's."""

    is_cuda = True
    device = types.SimpleNamespace(index=0)


def stand_in(monkeypatch) -> None:
    """Launches go to device 0, whose stream is named; no binary is known yet."""
    monkeypatch.setattr(launch, "_current_device", lambda: 0)
    monkeypatch.setattr(launch, "_binaries", {})
    active = types.SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
