"""blocks.run: every item once, on one thread, with bits that do not depend on the threads."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fastlora import blocks


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_run_calls_every_item_once_with_one_intra_op_thread(threads):
    torch.set_num_threads(threads)
    seen, counts = [], set()

    def work(item):
        seen.append(item)
        counts.add(torch.get_num_threads())

    blocks.run(work, range(50))
    assert sorted(seen) == list(range(50))
    assert counts == {1}
    assert torch.get_num_threads() == threads


def test_run_uses_as_many_threads_as_torch_said():
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=30)
    names = set()

    def work(_):
        together.wait()
        names.add(threading.current_thread().name)

    with blocks.single_thread():
        assert torch.get_num_threads() == 1
        blocks.run(work, range(3))
    assert len(names) == 3
    assert torch.get_num_threads() == 3


def test_run_backward_inside_single_thread_is_on_the_calling_thread():
    torch.set_num_threads(2)
    found = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append((threading.current_thread(), torch.get_num_threads()))
            return grad

    with blocks.single_thread():
        Probe.apply(torch.zeros(2, requires_grad=True)).sum().backward()
    assert found == [(threading.current_thread(), 1)]


def test_run_equal_bits_for_every_number_of_threads():
    x = torch.randn(512, 1536, generator=torch.Generator().manual_seed(0))
    w = torch.randn(1536, 576, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        y = torch.empty(512, 576)

        def work(start, y=y):
            torch.mm(x[start : start + 128], w, out=y[start : start + 128])

        blocks.run(work, range(0, 512, 128))
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_run_raises_the_first_error_and_works_again():
    torch.set_num_threads(2)

    def fail(item):
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        blocks.run(fail, range(100))
    assert torch.get_num_threads() == 2
    done = []
    blocks.run(done.append, range(5))
    assert sorted(done) == list(range(5))


def test_run_nested_is_inline():
    torch.set_num_threads(2)
    pairs = []

    def outer(item):
        here = threading.current_thread()
        blocks.run(
            lambda other: pairs.append((item, other, threading.current_thread() is here)), "ab"
        )

    blocks.run(outer, range(3))
    assert sorted(pairs) == [(i, c, True) for i in range(3) for c in "ab"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_run_keeps_the_gradient_mode(mode):
    torch.set_num_threads(2)
    seen = set()
    with mode():
        wanted = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        blocks.run(
            lambda _: seen.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled())),
            range(20),
        )
    assert seen == {wanted}


def test_single_thread_restores_after_errors_and_nests():
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), blocks.single_thread():
        with blocks.single_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_run_in_a_forked_child():
    torch.set_num_threads(2)
    blocks.run(lambda _: None, range(4))
    child = os.fork()
    if child == 0:
        done = []
        blocks.run(done.append, range(4))
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
