"""Where the installed Triton does not compile a warp-specialised kernel: said once, and the portable kernel takes over."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.compiler.errors import CompilationError

from fastlora.kernels import attention_specialized, attention_specialized_keys, gemm_specialized, hopper, launch, tables
from fastlora.kernels.columns import Columns
from fastlora.ops.attention_triton import document_edges

if hopper.MISSING is not None:
    pytest.skip(f"this Triton has no Gluon: {hopper.MISSING}", allow_module_level=True)


@pytest.fixture
def call(monkeypatch):
    """run() on tensors of the host, whose launch does what is asked."""
    monkeypatch.setattr(hopper, "_refused", {})
    monkeypatch.setattr(launch, "arch_at", lambda device: "sm_90")
    gemm_specialized.plan.cache_clear()
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((32, 128), (64, 128), (32, 64)))

    def run(launched):
        monkeypatch.setattr(launch.Launch, "__call__", launched)
        return gemm_specialized.run(x, weight, None, None, None, out, transposed=True)

    yield run
    gemm_specialized.plan.cache_clear()


def test_a_kernel_that_does_not_compile_is_said_once_and_not_tried_again(call):
    def broken(self, *arguments):
        raise CompilationError("async_load", None, "no such thing")

    assert hopper.usable("sm_90", "GEMM") and not hopper.usable("sm_100", "GEMM")
    with pytest.warns(UserWarning, match="GEMM does not compile with this Triton.*the portable kernel runs"):
        assert call(broken) is False
    assert not hopper.usable("sm_90", "GEMM") and hopper.usable("sm_90", "attention")


def test_a_failed_pass_of_the_compiler_counts_as_not_compiling(call):
    def broken(self, *arguments):
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="PassManager"):
        assert call(broken) is False


def test_any_other_error_of_a_launch_is_not_swallowed(call):
    def broken(self, *arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(broken)
    assert hopper.usable("sm_90", "GEMM")


def test_a_product_that_another_kernel_serves_is_left_to_it(monkeypatch):
    x, weight, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((32, 128), (64, 128), (32, 64)))
    assert gemm_specialized.run(x, weight, None, None, None, out, transposed=True) is False


def test_blocks_are_what_the_kernel_was_written_for(call):
    seen = {}

    def launched(self, *arguments):
        blocks = [list(a.block_shape) for a in self._described(arguments) if hasattr(a, "block_shape")]
        seen.update(kernel=self.kernel, grid=self.grid, blocks=blocks, **self.constants)

    assert call(launched) is True
    assert seen["kernel"] is gemm_specialized.gemm_specialized_kernel and seen["grid"] == (1, 1, 1)
    assert seen["blocks"] == [[64, 64], [64, 64], [64, 64], [64, 64], [64, 16]]
    assert (seen["N"], seen["K"], seen["R"], seen["STAGES"], seen["BIAS"]) == (64, 128, 0, 8, False)


@pytest.mark.parametrize(
    "rows, outer, width", [(1, 64, 64), (512, 2048, 64), (1024, 2048, 128), (512, 8192, 256), (8192, 4096, 256), (128, 256 * 132, 256)]
)
def test_a_product_of_few_tiles_takes_the_narrowest_that_fill_one_turn(rows, outer, width):
    assert tables.gemm_specialized_tile(rows, outer, 132).bn == width


@pytest.mark.parametrize(
    "starts, transposed, expected",
    [
        ((0, 4096, 5120), True, (64, 4096, 5120)), ((0, 512), True, (64, 512, 0)), ((0, 5120), True, (64, 5120, 0)),
        # a projection that begins inside a tile: every tile takes all columns, without the block of padding
        ((0, 576, 768), True, (192, 0, 0)), ((0, 4096, 5120), False, (192, 0, 0)), ((0,), True, (64, 0, 0)),
    ],
)  # fmt: skip
def test_which_rank_columns_a_tile_takes(starts, transposed, expected):
    layout = Columns((64,) * len(starts), starts, (256,) * len(starts), (1.0,) * len(starts))
    found = gemm_specialized.rank_columns(layout, layout.columns, tables.GEMM_SPECIALIZED[-1], transposed=transposed)
    assert found == expected


HEADS, KEY_HEADS, TOKENS, WIDTH = 4, 2, 192, 64
EDGES = document_edges(((0, TOKENS),), torch.device("cpu"))


def heads_of_one_buffer(*counts, tokens=TOKENS, width=WIDTH):
    """[H, T, D] views of the columns of one buffer, as a fused layer holds queries, keys and values."""
    buffer, views, at = torch.zeros(tokens, sum(counts) * width, dtype=torch.bfloat16), [], 0
    for count in counts:
        views.append(buffer[:, at : at + count * width].view(tokens, count, width).transpose(0, 1))
        at += count * width
    return views


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "_refused", {})
    monkeypatch.setattr(launch, "arch_of", lambda tensor: "sm_90")


@pytest.mark.parametrize(
    "counts, width, window, softcap, served",
    [
        ((4, 2, 2), 64, None, None, True), ((8, 1, 1), 128, None, None, True), ((3, 1, 1), 64, None, None, False),
        ((2, 2, 2), 64, None, None, False), ((4, 2, 2), 32, None, None, False), ((4, 2, 2), 64, 100, None, False),
        ((4, 2, 2), 64, None, 5.0, False),
    ],
)  # fmt: skip
def test_which_attention_the_specialised_kernels_serve(on_hopper, counts, width, window, softcap, served):
    q, k, v = heads_of_one_buffer(*counts, width=width)
    assert attention_specialized.serves(q, k, v, EDGES, window, softcap) is served
    assert not attention_specialized.serves(q.float(), k.float(), v.float(), EDGES, window, softcap)
    # heads that do not lie beside each other
    assert not attention_specialized.serves(q, k, v, EDGES, window, softcap, torch.zeros_like(q).contiguous())


def test_attention_that_does_not_compile_runs_on_the_portable_kernels(on_hopper, monkeypatch):
    q, k, v = heads_of_one_buffer(HEADS, KEY_HEADS, KEY_HEADS)

    def broken(*arguments, **constants):
        raise CompilationError("async_load", None, "no such thing")

    monkeypatch.setattr(launch, "run", broken)
    edges, lse = EDGES, torch.zeros(HEADS, TOKENS)
    with pytest.warns(UserWarning, match="attention does not compile"):
        assert attention_specialized.forward(q, k, v, torch.zeros_like(q), lse, edges, 0.125) is False
    assert not attention_specialized.serves(q, k, v, EDGES, None, None)


def test_attention_is_launched_with_what_its_kernels_were_written_for(on_hopper, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, tile, *arguments, **constants: seen.append((grid, arguments, constants)))
    q, k, v = heads_of_one_buffer(HEADS, KEY_HEADS, KEY_HEADS)
    dq, dk, dv = heads_of_one_buffer(HEADS, KEY_HEADS, KEY_HEADS)
    dout, (lse, delta) = heads_of_one_buffer(HEADS)[0], torch.zeros(2, HEADS, TOKENS)
    edges = EDGES
    assert attention_specialized.forward(q, k, v, dout, lse, edges, 0.125)
    assert attention_specialized.backward_dq(dout, q, k, v, lse, delta, dq, edges, 0.125)
    assert attention_specialized_keys.backward_dkv(dout, q, k, v, lse, delta, dk, dv, edges, 0.125)
    # 3 blocks of queries for 2 pairs of heads on a grid of 3; 3 blocks of keys in 2 pairs for 2 key heads
    assert [grid for grid, _, _ in seen] == [(3,), (3,), (4,)]
    rows = (HEADS + 2 * KEY_HEADS) * WIDTH
    for _, arguments, constants in seen:
        made = [a for a in arguments if hasattr(a, "block_shape")]
        assert all(list(a.block_shape) == [64, WIDTH] and list(a.strides) in ([rows, 1], [HEADS * WIDTH, 1]) for a in made)
        assert made[0].base.data_ptr() == q.data_ptr() and made[1].base.data_ptr() == k.data_ptr()
        assert (constants["GROUPS"], constants["D"], constants["B"], constants["STAGES"]) == (2, WIDTH, 64, 3)
    assert (seen[2][2]["DK_T"], seen[2][2]["DV_T"]) == (rows, rows)


def spans(*lengths):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(zip([0, *ends], ends))


@pytest.mark.parametrize(
    "lengths, orders, short",
    [
        ((64,), ([0], [0]), True), ((64, 192, 64), ([3, 2, 0, 1, 4], [0, 1, 2]), True), ((128, 256), ([5, 4, 1, 3, 0, 2], [1, 0, 2]), False),
        ((192,), ([2, 1, 0], [0, 1]), False), ((128,) * 4, ([1, 3, 5, 7, 0, 2, 4, 6], [0, 1, 2, 3]), True),
    ],
)  # fmt: skip
def test_edges_order_blocks_by_their_walks(lengths, orders, short):
    found = document_edges(spans(*lengths), torch.device("cpu"))
    blocks = sum(lengths) // 64
    assert found.table.dtype == torch.int32 and found.table.shape == (4, blocks)
    firsts = [start for start, end in spans(*lengths) for _ in range(start, end, 64)]
    ends = [end for start, end in spans(*lengths) for _ in range(start, end, 64)]
    assert found.table[:2].tolist() == [firsts, ends]
    assert found.table[2].tolist() == orders[0] and found.table[3, : (blocks + 1) // 2].tolist() == orders[1]
    assert found.short is short


def test_short_walks_are_left_to_the_portable_kernels(on_hopper):
    q, k, v = heads_of_one_buffer(HEADS, KEY_HEADS, KEY_HEADS)
    assert attention_specialized.serves(q, k, v, EDGES, None, None)
    assert not attention_specialized.serves(q, k, v, document_edges(spans(64, 128), q.device), None, None)
