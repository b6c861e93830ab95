"""Sums that run beside a product: in order, once, and held until they are over."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch

from fastlora.ops import beside
from fastlora.ops.beside import LARGE, Beside, Later


class Streams:
    """Two streams without a GPU: every call is noted."""

    def __init__(self, monkeypatch) -> None:
        self.seen: list[str] = []
        self.inside = 0
        main = types.SimpleNamespace(
            record_event=lambda: self.seen.append("event"), wait_stream=lambda other: self.seen.append("joined")
        )
        second = types.SimpleNamespace(wait_event=lambda event: self.seen.append("second waits"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(beside, "_second", lambda index: second)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self)

    def __enter__(self) -> None:
        self.inside += 1

    def __exit__(self, *error) -> None:
        self.inside -= 1

    def sum(self, name: str):
        self.seen.append(f"{name} {'beside' if self.inside else 'here'}")
        return name


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def on_gpu() -> Beside:
    return Beside(types.SimpleNamespace(type="cuda", index=0))


def test_a_large_product_starts_first_and_is_joined_by_the_next(streams):
    with on_gpu() as work:
        first = work.add(streams.sum, "a")
        with work.product(LARGE):
            second = work.add(streams.sum, "b")
            streams.seen.append("product")
        assert streams.seen == ["event", "product", "second waits", "a beside", "b beside"]
        assert (first.value, second.value) == ("a", "b")
        with work.product(LARGE):
            streams.seen.append("product")
        assert streams.seen[5:] == ["joined", "event", "product"]
    assert streams.seen[8:] == []


def test_what_waits_at_the_end_runs_on_the_current_stream_and_then_all_are_joined(streams):
    with on_gpu() as work:
        with work.product(LARGE):
            work.add(streams.sum, "a")
        last = work.add(streams.sum, "b")
    assert streams.seen == ["event", "second waits", "a beside", "b here", "joined"] and last.value == "b"


@pytest.mark.parametrize("device, size", [("cuda", LARGE - 1), ("cpu", LARGE)])
def test_beside_a_small_product_and_on_a_cpu_sums_run_after_it(streams, device, size):
    with Beside(types.SimpleNamespace(type=device, index=0)) as work:
        work.add(streams.sum, "a")
        with work.product(size):
            streams.seen.append("product")
    assert streams.seen == ["product", "a here"]


def test_what_a_sum_reads_is_held_until_it_is_over_and_no_longer(streams):
    tensor = torch.zeros(3)
    alive = weakref.ref(tensor)
    with on_gpu() as work:
        later = work.add(lambda t: t.shape, tensor)
        with work.product(LARGE):
            pass
        del tensor
        gc.collect()
        assert later.value == (3,) and alive() is not None
    gc.collect()
    assert alive() is None


def test_an_error_in_the_product_reaches_the_caller_and_runs_no_sum(streams):
    with pytest.raises(RuntimeError, match="out of memory"), on_gpu() as work:
        work.add(streams.sum, "a")
        with work.product(LARGE):
            raise RuntimeError("out of memory")
    assert streams.seen == ["event"]


def test_sums_that_run_are_waited_for_when_a_later_operation_fails(streams):
    # what they add to is zeroed next, and the micro-batch tried again in smaller ones
    with pytest.raises(RuntimeError, match="out of memory"), on_gpu() as work:
        work.add(streams.sum, "a")
        with work.product(LARGE):
            pass
        work.add(streams.sum, "b")
        raise RuntimeError("out of memory")
    assert streams.seen == ["event", "second waits", "a beside", "joined"]


def test_a_value_that_is_there_already_needs_no_run():
    assert Later(None, 5).value == 5
