"""The block level as pytest-benchmark tests: ``pytest bench/test_block.py --benchmark-json=FILE``."""

from __future__ import annotations

import pytest

from bench import block_cases, timing
from bench.cases import measure

CASES = block_cases.all_cases(timing.device_type())


def pytest_generate_tests(metafunc) -> None:
    """One test for each block, size and system."""
    ids = [f"{name}-{size}-{system}" for name, size, system in CASES]
    metafunc.parametrize(
        ("case", "system"), [((block_cases.make, *each), each[2]) for each in CASES], indirect=["case"], ids=ids
    )


@pytest.mark.benchmark(group="block", timer=timing.host_clock)
def test_block(benchmark, case, system, device):
    """One block's time, with its ratio to the baseline in ``extra_info``."""
    measure(benchmark, case, system, device)
