"""A binary started without the Python of Triton 3.6's launcher: the same arguments, each descriptor encoded once an address."""

from __future__ import annotations

import functools
import types

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

import triton

from fastlora.kernels import direct, launch
from fastlora.kernels.tables import Tile
from tests.unit.gpu_standin import OnGpu, stand_in

driver = pytest.importorskip("triton.backends.nvidia.driver", reason="the launcher is that of NVIDIA's backend")
BASE = 13  # arguments before the kernel's: grid, stream, function, two flags, two buffers, metadata, three hooks


def on_gpu(*shape):
    return torch.zeros(*shape).as_subclass(OnGpu)


def describe(tensor):
    return types.SimpleNamespace(base=tensor, block_shape=[2, 2])


@pytest.fixture
def encoded(monkeypatch):
    """The descriptors that were encoded, with what the compiler said of them."""
    seen = []

    def encode(descriptor, meta):
        seen.append((descriptor.base.data_ptr(), meta))
        return [f"map of {descriptor.base.data_ptr()} for {meta}", *descriptor.base.shape]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode, raising=False)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    return seen


def compiled(metas=(), **changed):
    """(what Triton 3.6 makes of a kernel, the calls of its C function): with descriptors a closure stands before that."""
    started = []

    # as a C function, it is no function of Python's
    launcher = functools.partial(lambda *given: started.append(given))

    def wrapped(launcher, tensordesc_meta):
        def inner(*given):
            given = list(given)
            for meta in tensordesc_meta:
                place = next(i for i, one in enumerate(given) if hasattr(one, "block_shape"))
                given[place : place + 1] = driver.make_tensordesc_arg(given[place], meta)
            return launcher(*given)

        return inner

    run = object.__new__(driver.CudaLauncher)
    run.__dict__ |= dict(launch=wrapped(launcher, list(metas)) if metas else launcher, launch_cooperative_grid=False, launch_pdl=False)
    run.__dict__ |= dict(global_scratch_size=0, profile_scratch_size=0) | changed
    return types.SimpleNamespace(run=run, function="function", packed_metadata="packed"), started


def as_triton_does(made, grid, stream, arguments, described, constants):
    """The way of Triton 3.6, through the closure."""
    given = [described[i](a) if i < len(described) and described[i] else a for i, a in enumerate(arguments)]
    given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
    run = made.run
    flags = run.launch_cooperative_grid, run.launch_pdl
    run.launch(*grid, stream, made.function, *flags, None, None, made.packed_metadata, None, None, None, *given, *constants)


@pytest.mark.parametrize("metas", [(), ("first", "second")])
def test_the_c_function_gets_what_triton_gives_it(encoded, metas):
    made, started = compiled(metas)
    described = (describe, None, describe) if metas else ()
    arguments = (on_gpu(4, 2), on_gpu(3), on_gpu(2, 2), 7)
    start = direct.direct(made)
    for _ in range(2):
        start((3, 1, 1), "stream", arguments, described, (64, True), pytest.fail)
    as_triton_does(made, (3, 1, 1), "stream", arguments, described, (64, True))
    assert len(started) == 3 and started[0] == started[1] == started[2]
    assert len(started[0]) > BASE


def test_a_descriptor_is_encoded_once_for_an_address_and_its_rows(encoded):
    made, started = compiled(("meta",))
    start, buffer = direct.direct(made), on_gpu(8, 2)
    for rows in (buffer, buffer[:4], buffer, buffer[:4], buffer[4:]):
        start((1, 1, 1), "stream", (rows,), (describe,), (), pytest.fail)
    assert encoded == [(buffer.data_ptr(), "meta")] * 2 + [(buffer[4:].data_ptr(), "meta")]
    assert [given[BASE + 1] for given in started] == [8, 4, 8, 4, 4]


def test_kept_descriptors_are_bounded(encoded, monkeypatch):
    monkeypatch.setattr(direct, "MOST_KEPT", 3)
    made, _ = compiled(("meta",))
    start, buffer = direct.direct(made), on_gpu(8, 2)
    for rows in (1, 2, 3, 4, 4, 1):
        start((1, 1, 1), "stream", (buffer[:rows],), (describe,), (), pytest.fail)
    assert len(encoded) == 5 and len(start._kept) == 2


def test_a_ready_descriptor_is_encoded_each_time(encoded):
    made, started = compiled(("meta",))
    start, ready = direct.direct(made), describe(on_gpu(2, 2))
    for _ in range(2):
        start((1, 1, 1), "stream", (ready, 5), (), (), pytest.fail)
    assert len(encoded) == 2 and started[0] == started[1] and started[0][-1] == 5


@pytest.mark.parametrize("described", [(), (describe,)])
def test_a_tensor_of_the_host_is_refused(encoded, described):
    made, started = compiled(("meta",) if described else ())
    kept = launch.Launch(types.SimpleNamespace(__name__="some_kernel"), (1,), Tile(1))
    with pytest.raises(ValueError, match=r"some_kernel: an argument of shape \(2, 3\) is on cpu"):
        direct.direct(made)((1, 1, 1), "stream", (torch.zeros(2, 3),), described, (), kept._refuse)
    assert not started


@pytest.mark.parametrize("changed", [dict(global_scratch_size=1), dict(profile_scratch_size=1)])
def test_a_binary_that_needs_memory_is_left_to_triton(encoded, changed):
    assert direct.direct(compiled(**changed)[0]) is None


def test_other_releases_and_launchers_are_left_to_triton(encoded, monkeypatch):
    assert direct.direct(types.SimpleNamespace(run=lambda *given: None)) is None
    other, started = compiled()
    other.run.launch = lambda *given: started.append(given)  # a closure of another make
    assert direct.direct(other) is None
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    assert direct.direct(compiled()[0]) is None


def test_a_kept_launch_starts_directly_where_it_can(encoded, monkeypatch):
    made, started = compiled(("meta",))

    class Kernel:
        __name__, arg_names = "some_kernel", ("d_x", "rows", "N")

        def __getitem__(self, grid):
            return lambda *given, **constants: made

    stand_in(monkeypatch)
    kept, x = launch.Launch(Kernel(), (3,), Tile(1), (describe,), N=64), on_gpu(4, 2)
    for _ in range(3):
        kept(x, 4)
    assert len(started) == 2 and started[0] == started[1]
    assert started[0][:5] == (3, 1, 1, "stream of 0", "function") and started[0][-2:] == (4, 64)
    assert encoded == [(x.data_ptr(), "meta")]
