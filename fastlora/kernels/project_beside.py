"""S = s x A^T, or dS = s dY B, inside the launch of the product that reads the same operand, for Hopper (compute capability 9.0).

A persistent grid whose tiles fill its last turn evenly leaves a few multiprocessors idle all the time (launch.even_programs). Programs on
those compute S, a row of tiles after the other, while the rest multiply: a tile needs its rows of S behind its last block of K alone, and
waits for them there. A pass over x by a kernel of its own, which leaves the tensor cores unused, is saved, and the bits are those of that
kernel (project.py; for dS at low rank token_sum.py, which adds sums of SUM features). The programs of S have the lowest numbers, so they
start first and wait for nobody: no order of starting programs can keep the others waiting for ever.

Words of ``p_ready``, one a row of tiles: 2 once both warpgroups have stored their rows; each tile that has seen it adds 1, and the last
one of the row sets 0 again, for the next launch. In Gluon (see hopper.py).
"""

from __future__ import annotations

import dataclasses

import torch

from fastlora.kernels import launch
from fastlora.kernels.columns import MOST, starts_and_widths
from fastlora.kernels.hopper import MISSING, barrier, gl, gluon
from fastlora.kernels.tables import DS_IN_TOKEN_SUM_MAX_RANK

if MISSING is None:
    from fastlora.kernels.gemm_blocks import load_blocks, multiply_tile

    @gluon.jit
    def order_memory(any_number):
        """What this thread did to memory, and what it has seen others do, comes before what it does next, bulk copies (TMA) included."""
        gl.inline_asm_elementwise(
            "fence.acq_rel.gpu; fence.proxy.async.global; mov.u32 $0, $1;", "=r,r", [any_number], dtype=gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def load_low(
        d_x, d_f, s_x, s_f, full, empty, num_m, helpers,
        S0: gl.constexpr, S1: gl.constexpr, S2: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr,
        C: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """The loading warp of a program of S: F0 features from S0 on for the first group of C columns, F1 from S1 on, F2 from S2 on."""
        turn = 0
        for i_m in range(gl.program_id(0), num_m, helpers):
            for i_p in gl.static_range(min(GROUPS, 3)):
                turn = load_blocks(
                    d_x, d_f, s_x, s_f, full, empty, turn, i_m * BM, i_p * C, S0 if i_p == 0 else S1 if i_p == 1 else S2,
                    F0 if i_p == 0 else F1 if i_p == 1 else F2, BM, C, BK, STAGES, TRANSPOSED,
                )  # fmt: skip

    @gluon.jit
    def multiply_group(
        HALF: gl.constexpr, p_low, p_scale, s_x, s_f, full, empty, turn, o_m, M, c0, WIDTH: gl.constexpr, SUM: gl.constexpr,
        LR: gl.constexpr, C: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
        layout: gl.constexpr,
    ):  # fmt: skip
        """Store the scaled sum over WIDTH features; the ring's turn after it."""
        b_sum = gl.zeros((BM // 2, C), gl.float32, layout)
        for _ in range(0, WIDTH, SUM):
            b_part, turn = multiply_tile(s_x, s_f, full, empty, turn, HALF, min(SUM, WIDTH), 0, BM, C, BK, STAGES, TRANSPOSED)
            b_sum += b_part
        o_c = c0 + gl.arange(0, C, gl.SliceLayout(0, layout))
        b_sum *= gl.load(p_scale + o_c)[None, :]
        o_low = o_m.to(gl.int64)[:, None] * LR + o_c[None, :]
        gl.store(p_low + o_low, b_sum.to(p_low.dtype.element_ty), mask=(o_m < M)[:, None])
        return turn

    @gluon.jit
    def multiply_low(
        HALF: gl.constexpr, p_low, p_scale, p_ready, s_x, s_f, full, empty, num_m, helpers, M,
        LR: gl.constexpr, SUM: gl.constexpr, F0: gl.constexpr, F1: gl.constexpr, F2: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
        BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup of a program of S: the upper (HALF = 0) or lower rows of each of its rows of tiles. Of a fourth group there
        are no features, and its columns are zeros."""
        layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
        turn = 0
        for i_m in range(gl.program_id(0), num_m, helpers):
            o_m = i_m * BM + HALF * (BM // 2) + gl.arange(0, BM // 2, gl.SliceLayout(1, layout))
            for i_p in gl.static_range(GROUPS):
                turn = multiply_group(
                    HALF, p_low, p_scale, s_x, s_f, full, empty, turn, o_m, M, i_p * C,
                    F0 if i_p == 0 else F1 if i_p == 1 else F2 if i_p == 2 else 0, SUM, LR, C, BM, BK, STAGES, TRANSPOSED, layout,
                )  # fmt: skip
            order_memory(i_m)
            barrier()
            o_t = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
            gl.atomic_add(p_ready + i_m + o_t * 0, o_t * 0 + 1, mask=o_t == 0, sem="release", scope="gpu")

    @gluon.jit
    def await_low(p_ready, i_m, num_n: gl.constexpr):
        """Wait until the rows of S of the ``i_m``-th row of tiles are there; each of its ``num_n`` tiles calls it once."""
        stored = gl.load(p_ready + i_m, volatile=True)
        while stored < 2:
            stored = gl.load(p_ready + i_m, volatile=True)
        order_memory(i_m)
        o_t = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        seen = gl.atomic_add(p_ready + i_m + o_t * 0, o_t * 0 + 1, mask=o_t == 0, sem="relaxed", scope="gpu")
        gl.store(p_ready + i_m + o_t * 0, o_t * 0, mask=(o_t == 0) & (seen == num_n + 1))


# Most columns of a group, of dS and of S: more, and a row takes its program longer than a tile takes the others.
MOST_COLUMNS, MOST_COLUMNS_OF_S = 64, 128
# How many rows of tiles a program of S makes in the time of one tile, with up to MOST_COLUMNS and with more: it reads little more than x,
# where a tile multiplies.
ROWS_A_TILE, ROWS_A_TILE_WIDE = 3, 2
# Turns of the tiles up to which S is worth it: on an H200 a product of 28 turns took 10 % longer with it, of 8 and 12 no longer than without.
MOST_TURNS = 16
# Multiplications from which on it is asked whether tiles leave room: a smaller product has few tiles, and its call is bound by the host.
LEAST = 2**32
# Words of a stream, so the most rows of tiles; and streams that have words of their own.
MOST_ROWS, MOST_STREAMS = 1024, 64
# Words behind them, for sums_beside.py.
MORE = 4


@dataclasses.dataclass(frozen=True)
class Low:
    """What S is made of.

    Attributes:
        columns: of a group. groups: how many, those without features zero. starts, widths: the features that a group reads. sum: features
            whose products are one fp32 sum; the sums are added in order.
    """

    columns: int
    groups: int
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    sum: int

    def constants(self) -> dict[str, int]:
        """For the kernels."""
        starts, widths = starts_and_widths(tuple(zip(self.starts, self.widths)))
        return dict(zip(("S0", "S1", "S2"), starts)) | dict(zip(("F0", "F1", "F2"), widths)) | dict(GROUPS=self.groups, C=self.columns, SUM=self.sum)


def low_of(layout, inner: int, dtype: torch.dtype, arch: str, *, transposed: bool, whole: bool = False) -> Low:
    """S of x [M, ``inner``] with ``transposed``, as project.py makes it, or its first columns; else dS of dY, as token_sum.py does at low
    ranks and project.py at others or, ``whole``, at any."""
    if transposed:
        used = layout.count * layout.padded
        # of three projections whose columns are too many, the third's have a kernel of their own
        columns = used - layout.padded if layout.count == MOST and used > MOST_COLUMNS_OF_S else layout.columns
        return Low(columns, 1, (0,), (inner,), inner)
    most = max(layout.widths)
    if layout.padded <= DS_IN_TOKEN_SUM_MAX_RANK and not whole:
        most = launch.token_sum_tile(arch, dtype, layout.padded, with_ds=True, features=inner).bn
    return Low(layout.padded, layout.columns // layout.padded, layout.starts, layout.widths, most)


def helpers(low: Low, rows: int, outer: int, tile, device: torch.device, *, transposed: bool) -> int:
    """How many programs make S beside the product [rows, outer] in tiles of ``tile``; 0: a kernel of its own has to."""
    down, across = launch.cdiv(rows, tile.bm), launch.cdiv(outer, tile.bn)
    programs = launch.even_programs(down * across, device)
    spare, turns = launch.persistent_programs(device) - programs, launch.cdiv(down * across, programs)
    first = min(down, tile.group)  # rows of tiles that are begun together
    whole = all(start % tile.bk == 0 and width % min(low.sum, width) == 0 for start, width in zip(low.starts, low.widths))
    depth = all(min(low.sum, width) % tile.bk == 0 for width in low.widths)
    most, each = (MOST_COLUMNS_OF_S, ROWS_A_TILE_WIDE) if transposed and low.columns > MOST_COLUMNS else (MOST_COLUMNS, ROWS_A_TILE)
    if tile.bn != 2 * tile.bm or low.columns > most or not (whole and depth) or down > MOST_ROWS:
        return 0
    return spare if turns <= MOST_TURNS and first <= each * spare and down < each * spare * turns else 0


_words: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}


def words(device: torch.device) -> torch.Tensor | None:
    """int32 [MOST_ROWS + MORE], zeros between launches, for launches on the current stream: those of one stream follow each other. None: all are
    taken, or a graph is captured, which may run on any stream."""
    if torch.cuda.is_current_stream_capturing():
        return None
    if device.index not in _words:
        _words[device.index] = torch.zeros(MOST_STREAMS, MOST_ROWS + MORE, dtype=torch.int32, device=device), {}
        torch.cuda.synchronize(device)  # other streams use them too
    free, taken = _words[device.index]
    stream = launch.current_stream(device.index)
    found = taken.get(stream)
    if found is None and len(taken) < MOST_STREAMS:
        found = taken[stream] = free[len(taken)]
    return found
