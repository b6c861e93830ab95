"""Marks that decide where a test runs: ``gpu`` needs a GPU, ``interpreter`` needs Triton's interpreter switched on."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption("--model", help="Folder of the demo's model, for tests with real weights.")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
        if "gpu" in item.keywords and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="the interpreter is on: kernels would not run on the GPU"))
        if "interpreter" in item.keywords and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the start (nox -s tests sets it)"))


@pytest.fixture
def poisoned(monkeypatch):
    """New buffers are full of NaN: an element that no program writes shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def fill(*args, real=real, **kwargs):
            made = real(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, fill)
