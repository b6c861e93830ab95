"""A kept launch: what it looks up once, what it hands to the binary, what it refuses."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")


from fastlora.kernels import launch
from fastlora.kernels.tables import Tile
from tests.unit.gpu_standin import OnGpu, stand_in


class Kernel:
    """Stands for a kernel; its binary remembers what it was started with."""

    __name__ = "stand_in_kernel"
    arg_names = ("p_x", "d_x", "count", "N")

    def __init__(self):
        self.compiled, self.started = 0, []

    def __getitem__(self, grid):
        def compile_and_start(*arguments, **constants):
            self.compiled += 1
            run = lambda *given: self.started.append(given)  # noqa: E731
            return types.SimpleNamespace(run=run, function="function", packed_metadata="packed")

        return compile_and_start


@pytest.fixture
def gpu(monkeypatch):
    stand_in(monkeypatch)


def test_a_kept_launch_compiles_once_and_hands_on_addresses(gpu):
    kernel, x = Kernel(), torch.zeros(4).as_subclass(OnGpu)
    kept = launch.Launch(kernel, (3,), Tile(1), N=4)
    for _ in range(3):
        kept(x, "descriptor", 7)
    assert kernel.compiled == 1
    expected = (3, 1, 1, "stream of 0", "function", "packed", None, None, None, x.data_ptr(), "descriptor", 7, 4)
    assert kernel.started == [expected] * 2
    # another launch of the same kernel, constants and dtypes finds the binary
    launch.run(kernel, (5,), Tile(1), x, "descriptor", 8, N=4)
    assert kernel.compiled == 1 and kernel.started[-1][0] == 5


def test_a_tensor_of_the_host_is_refused_by_name(gpu):
    kernel, x = Kernel(), torch.zeros(4).as_subclass(OnGpu)
    kept = launch.Launch(kernel, (1,), Tile(1), N=4)
    for _ in range(2):
        kept(x, "descriptor", 7)
    with pytest.raises(ValueError, match=r"stand_in_kernel: an argument of shape \(2, 3\) is on cpu; allowed: the GPU"):
        kept(x, torch.zeros(2, 3), 7)
    assert len(kernel.started) == 1


def test_the_dtype_of_a_parameter_decides_the_binary(gpu):
    kernel, x = Kernel(), torch.zeros(4).as_subclass(OnGpu)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        launch.run(kernel, (1,), Tile(1), x, torch.nn.Parameter(torch.zeros(4, dtype=dtype).as_subclass(OnGpu)), 7, N=4)
    assert kernel.compiled == 2


@pytest.mark.parametrize("index", [0, 1], ids=["current", "another"])
def test_empty_tensors_lie_where_they_are_asked_for(gpu, monkeypatch, index):
    """Past the dispatcher they lie on the current device, so for another one torch is asked."""
    calls, like = [], torch.zeros(4, dtype=torch.bfloat16).as_subclass(OnGpu)

    def of_the_device(*arguments):
        calls.append(arguments)
        return torch._C._dynamo.guards._empty_strided_cpu(*arguments)

    monkeypatch.setattr(launch, "_empty_strided", of_the_device)
    monkeypatch.setattr(OnGpu, "get_device", lambda self: index, raising=False)
    for shape, dtype in (((3, 5), None), ((2, 3, 5), torch.float32), ((0, 7), None)):
        made = launch.empty(like, *shape, dtype=dtype)
        assert made.shape == shape and made.is_contiguous() and made.dtype == (dtype or torch.bfloat16)
    assert len(calls) == (3 if index == 0 else 0)


def test_an_empty_tensor_of_the_host():
    made = launch.empty(torch.zeros(1), 3, 5, dtype=torch.float16)
    assert made.shape == (3, 5) and made.dtype == torch.float16
