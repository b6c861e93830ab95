"""pytest-benchmark's JSON says where its figures come from, and the terminal says what is not timed here."""

from __future__ import annotations

import pytest
import torch

from bench import level, timing
from bench.cases import NO_GPU
from bench.provenance import provenance


def pytest_report_header() -> str:
    """The device, and on a machine without a GPU what its times are worth."""
    return f"bench: {torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Commit, GPU and versions beside pytest-benchmark's own description of the machine."""
    machine_info["fastlora"] = provenance()


@pytest.fixture(scope="session")
def kept() -> level.Kept:
    """The result file."""
    return level.Kept()


@pytest.fixture(autouse=True)
def keep(kept, benchmark):
    """A row of the result file after each test."""
    yield
    kept.add(benchmark.param, benchmark.extra_info)


@pytest.fixture
def device() -> str:
    """"cuda" or "cpu"."""
    return timing.device_type()


@pytest.fixture
def case(request, device):
    """The case named by the test's parameters; its memory is given back after the test."""
    from bench.shapes import default_dtype

    make, name, size, _ = request.param
    torch.manual_seed(0)
    made = make(name, size, device, default_dtype(device))
    yield made
    made.close()
