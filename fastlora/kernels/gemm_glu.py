"""The products of a gated feed-forward layer with the gate in their epilogue, for Hopper (compute capability 9.0).

    forward     [gate, up] = x W^T + S B^T      hidden = act(gate) * up
    backward    dhidden = dz W + dS A           [dgate, dup] and hidden again

The GEMM is that of gemm_specialized.py, the gate that of glu.py, and so are the bits: both round where a kernel of its own would have
stored. What is saved is a pass over memory: forward, gate and up are not read again; backward, dhidden is neither written nor read. A
tile of the forward is as many features of the gate as of up; in the backward the loading warp brings the tile's gate and up through the
ring, behind the blocks of the product. Source: the epilogue fusion of CUTLASS 3 (NVIDIA), here in Gluon (see hopper.py).
"""

from __future__ import annotations

import functools

import torch

from fastlora.kernels import gemm_dropout, gemm_specialized, hopper, launch
from fastlora.kernels.gemm_specialized import PARTS, WIDEST
from fastlora.kernels.glu import activate
from fastlora.kernels.hopper import (
    MISSING,
    attempt,
    copy_in,
    copy_out,
    describe,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma,
)
from fastlora.kernels.masks import masks

NAME = "GEMM with a gate"


if MISSING is None:
    from fastlora.kernels.gemm_blocks import load_block, load_blocks, load_halves, multiply_tile, quarters, tile_at
    from fastlora.kernels.gemm_dropout import add_rank_blocks
    from fastlora.kernels.gemm_mask import read_mask
    from fastlora.kernels.ring import claim, leave, ring

    # the same function, compiled for Gluon
    activate_here = gluon.jit(activate.fn)

    @gluon.jit
    def load_pair(
        d_x, d_w, s_x, s_pair, full, empty, turn, m0, n0, i_k,
        F: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """As ``load_block``, of BN / 2 features of the gate and the same of up."""
        stage, bar = claim(full, empty, turn, (BM + BN) * BK * 2, STAGES)
        load_halves(d_x, s_x, bar, stage, m0, i_k, BM)
        for i_part in gl.static_range(2):
            copy_in(d_w, [n0 + i_part * F, i_k], bar, s_pair.index(stage * 2 + i_part))

    @gluon.jit
    def load_forward(
        d_x, d_w, d_s, d_b, s_x, s_pair, full, empty, num_m,
        F: gl.constexpr, K: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp of the forward."""
        num_n: gl.constexpr = F // (BN // 2)
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0, n0 = i_m * BM, i_n * (BN // 2)
            for i_k in range(0, K, BK):
                load_pair(d_x, d_w, s_x, s_pair, full, empty, turn, m0, n0, i_k, F, BM, BN, BK, STAGES)
                turn += 1
            for i_r in gl.static_range(0, R, BK):
                load_pair(d_s, d_b, s_x, s_pair, full, empty, turn, m0, n0, i_r, F, BM, BN, BK, STAGES)
                turn += 1

    @gluon.jit
    def multiply_forward(
        HALF: gl.constexpr, d_y, d_h, s_x, s_w, s_y, full, empty, num_m,
        F: gl.constexpr, K: gl.constexpr, R: gl.constexpr, ACTIVATION: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup of the forward: the upper (HALF = 0) or lower rows of every tile of this program."""
        num_n: gl.constexpr = F // (BN // 2)
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0 = i_m * BM + HALF * (BM // 2)
            b_acc, turn = multiply_tile(s_x, s_w, full, empty, turn, HALF, K, R, BM, BN, BK, STAGES, True)
            b_parts = quarters(b_acc.to(d_y.dtype), BM // 2, BN)  # two of the gate, two of up
            for i_part in gl.static_range(2):
                b_g, b_u = b_parts[i_part], b_parts[i_part + 2]
                n1 = i_n * (BN // 2) + i_part * (BN // 4)
                leave(b_g, d_y, s_y.index(HALF * 2 + i_part % 2), m0, n1, 1)
                leave(b_u, d_y, s_y.index(HALF * 2 + (i_part + 1) % 2), m0, F + n1, 1)
                b_act, _ = activate_here(b_g.to(gl.float32), ACTIVATION)
                b_h = b_act.to(d_y.dtype).to(gl.float32) * b_u.to(gl.float32)
                leave(b_h, d_h, s_y.index(HALF * 2 + i_part % 2), m0, n1, 1)
        tma.store_wait(0)

    @gluon.jit
    def load_backward(
        d_x, d_w, d_s, d_b, d_gu, s_x, s_w, s_parts, full, empty, num_m,
        F: gl.constexpr, K: gl.constexpr, BLOCKS: gl.constexpr, DEPTH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """The loading warp of the backward: behind a tile's product its gate and up, BK features a place of the ring."""
        num_n: gl.constexpr = F // BN
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0, n0 = i_m * BM, i_n * BN
            turn = load_blocks(d_x, d_w, s_x, s_w, full, empty, turn, m0, n0, 0, K, BM, BN, BK, STAGES, False)
            for i in gl.static_range(BLOCKS):
                load_block(d_s, d_b, s_x, s_w, full, empty, turn, m0, n0, i * DEPTH, BM, BN, BK, STAGES, False)
                turn += 1
            for i_part in gl.static_range(BN // BK):
                stage, bar = claim(full, empty, turn, 2 * BM * BK * 2, STAGES)
                n1 = n0 + i_part * BK
                load_halves(d_gu, s_x, bar, stage, m0, n1, BM)
                load_halves(d_gu, s_parts, bar, stage * (BN // BK // 2), m0, F + n1, BM)
                turn += 1

    @gluon.jit
    def multiply_backward(
        HALF: gl.constexpr, d_dgu, d_h, s_x, s_w, s_parts, s_y, full, empty, num_m, p_bits, M, keep_scale, count,
        F: gl.constexpr, K: gl.constexpr, R: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, ACTIVATION: gl.constexpr,
        BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """A multiplying warpgroup of the backward."""
        num_n: gl.constexpr = F // BN
        turn = 0
        for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
            i_m, i_n = tile_at(tile, num_m, num_n, GROUP)
            m0 = i_m * BM + HALF * (BM // 2)
            b_mask = 0
            if PLACES > 0:
                b_mask = read_mask(p_bits, 0, m0, i_n * BN, M, True, F // 32)
            b_acc, turn = multiply_tile(s_x, s_w, full, empty, turn, HALF, K, R, BM, BN, BK, STAGES, False)
            if PLACES > 0:
                b_0, b_1, b_2, b_3, turn = add_rank_blocks(
                    b_acc, s_x, s_w, full, empty, turn, b_mask, b_mask, b_mask, keep_scale, count, HALF, PLACES, DEPTH, STAGES
                )
            else:
                b_0, b_1, b_2, b_3 = quarters(b_acc, BM // 2, BN)
            b_parts = (b_0, b_1, b_2, b_3)
            for i_part in gl.static_range(4):
                b_part = b_parts[i_part]
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                b_place, b_other = s_x.index(stage * 2 + HALF), s_parts.index(stage * (BN // BK) + HALF)
                b_hidden = s_y.index(HALF * 2 + i_part % 2)
                b_g = b_place.load(b_part.type.layout)
                b_u = b_other.load(b_part.type.layout).to(gl.float32)
                b_d = b_part.to(d_h.dtype).to(gl.float32)
                b_act, b_slope = activate_here(b_g.to(gl.float32), ACTIVATION)
                b_act = b_act.to(d_h.dtype).to(gl.float32)
                b_dact = (b_d * b_u).to(d_h.dtype).to(gl.float32)
                # gradients leave from where gate and up came
                b_place.store((b_dact * b_slope).to(d_h.dtype))
                b_other.store((b_d * b_act).to(d_h.dtype))
                b_hidden.store((b_act * b_u).to(d_h.dtype))
                fence_async_shared()
                n1 = i_n * BN + i_part * BK
                # the last one first: the warpgroup's barrier before it, behind the fence, then serves all
                copy_out(d_h, [m0, n1], b_hidden)
                copy_out(d_dgu, [m0, F + n1], b_other)
                copy_out(d_dgu, [m0, n1], b_place)
                if i_part > 0:
                    tma.store_wait(3)  # those of the part before have been read
                    mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
                turn += 1
            tma.store_wait(0)
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))

    @gluon.jit(do_not_specialize=["M"])
    def gemm_glu_forward_kernel(
        d_x, d_w, d_s, d_b, d_y, d_h, M,
        F: gl.constexpr, K: gl.constexpr, R: gl.constexpr, ACTIVATION: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K]; d_w [2 F, K]; d_s [M, LR]; d_b [2 F, LR]; d_y [M, 2 F]; d_h [M, F]: descriptors, of half a tile's rows of x, s, y and
        h, and of half a tile's features of w and b. F is a multiple of BN / 2."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_pair = gl.allocate_shared_memory(d_w.dtype, [STAGES * 2, BN // 2, BK], d_w.layout)
        s_w = reinterpret(s_pair, d_w.dtype, [STAGES, BN, BK], d_w.layout)
        s_y = gl.allocate_shared_memory(d_y.dtype, [4, BM // 2, BN // 4], d_y.layout)
        full, empty = ring(STAGES, 1), ring(STAGES, 2)
        num_m = (M + BM - 1) // BM
        gl.warp_specialize(
            [
                (multiply_forward, (
                    0, d_y, d_h, s_x, s_w, s_y, full, empty, num_m, F, K, R, ACTIVATION, BM, BN, BK, STAGES, GROUP,
                )),
                (multiply_forward, (
                    1, d_y, d_h, s_x, s_w, s_y, full, empty, num_m, F, K, R, ACTIVATION, BM, BN, BK, STAGES, GROUP,
                )),
                (load_forward, (
                    d_x, d_w, d_s, d_b, s_x, s_pair, full, empty, num_m, F, K, R, BM, BN, BK, STAGES, GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip

    @gluon.jit(do_not_specialize=["M", "count"])
    def gemm_glu_backward_kernel(
        d_x, d_w, d_s, d_b, d_gu, d_dgu, d_h, p_bits, M, keep_scale, count,
        F: gl.constexpr, K: gl.constexpr, R: gl.constexpr, PLACES: gl.constexpr, DEPTH: gl.constexpr, ACTIVATION: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
        BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """d_x [M, K]; d_w [K, F]; d_s [M, LR]; d_b [LR, F]; d_gu and d_dgu [M, 2 F]; d_h [M, F]: descriptors, of half a tile's rows but for
        w and b. F is a multiple of BN, and BK a quarter of it.

        R rank columns are part of the product; or, with dropout, those of the ``count`` = 1 projection are a product of their own, PLACES
        blocks of DEPTH (gemm_dropout.py, as are p_bits and keep_scale)."""
        s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * 2, BM // 2, BK], d_x.layout)
        s_w = gl.allocate_shared_memory(d_w.dtype, [STAGES, BK, BN], d_w.layout)
        # the same memory as blocks of BK features
        s_parts = reinterpret(s_w, d_w.dtype, [STAGES * (BN // BK), BK, BK], d_gu.layout)
        s_y = gl.allocate_shared_memory(d_h.dtype, [4, BM // 2, BN // 4], d_h.layout)
        full, empty = ring(STAGES, 1), ring(STAGES, 2)
        num_m = (M + BM - 1) // BM
        gl.warp_specialize(
            [
                (multiply_backward, (
                    0, d_dgu, d_h, s_x, s_w, s_parts, s_y, full, empty, num_m, p_bits, M, keep_scale, count,
                    F, K, R, PLACES, DEPTH, ACTIVATION, BM, BN, BK, STAGES, GROUP,
                )),
                (multiply_backward, (
                    1, d_dgu, d_h, s_x, s_w, s_parts, s_y, full, empty, num_m, p_bits, M, keep_scale, count,
                    F, K, R, PLACES, DEPTH, ACTIVATION, BM, BN, BK, STAGES, GROUP,
                )),
                (load_backward, (
                    d_x, d_w, d_s, d_b, d_gu, s_x, s_w, s_parts, full, empty, num_m,
                    F, K, PLACES + (R + BK - 1) // BK, DEPTH, BM, BN, BK, STAGES, GROUP,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def blocks_of(tile, *, forward: bool) -> dict[str, tuple[int, int]]:
    """The block [rows, columns] of each descriptor of a kernel."""
    x, out = (tile.bm // 2, tile.bk), (tile.bm // 2, tile.bn // PARTS)
    w = (tile.bn // 2, tile.bk) if forward else (tile.bk, tile.bn)
    return {"d_x": x, "d_w": w, "d_s": x, "d_b": w} | ({"d_y": out, "d_h": out} if forward else {"d_gu": out, "d_dgu": out, "d_h": out})


@functools.lru_cache(maxsize=1024)  # rows differ from step to step
def plan(rows, inner, features, stored, layout, activation, forward, dropout, dtype, device) -> launch.Launch | None:
    """What the shape decides, or None where the product and the gate are two kernels; ``features``: of the gate, F; ``stored``: columns of s,
    0 without it; ``dropout``: whether the backward's rank-r product is masked."""
    arch = launch.arch_at(device)
    if not (hopper.serves(arch) and launch.can_use_tma(arch, dtype, inner, features)) or features % WIDEST:
        return None
    outer = 2 * features if forward else features
    tile = launch.gemm_specialized_tile(rows, outer, launch.persistent_programs(device))
    if tile.bn != WIDEST:
        return None  # few tokens: narrow tiles busy more multiprocessors, and the gate's pass is in the cache
    rank = 0
    if stored:
        # a tile of the forward is of both projections: it takes the columns of both, where a product alone takes each one's
        rank, apart = (gemm_specialized.rank_columns(layout, stored, tile, transposed=side)[0] for side in (False, True))
        if forward and launch.cdiv(rank, tile.bk) > launch.cdiv(apart, tile.bk):
            return None
    constants = {}
    if not forward:
        places = gemm_dropout.places_of(1, layout.padded, tile) if dropout else (0, tile.bk)
        if places is None:
            return None
        rank = 0 if dropout else rank
        constants = dict(zip(("PLACES", "DEPTH"), places))
    wide = {"d_x": inner, "d_w": inner if forward else features, "d_s": stored or inner, "d_h": features}
    wide["d_b"] = (stored if forward else features) if stored else wide["d_w"]
    wide["d_y"] = wide["d_gu"] = wide["d_dgu"] = 2 * features
    made = (launch.describer(dtype, wide[name], *block, describe) for name, block in blocks_of(tile, forward=forward).items())
    tiles = launch.cdiv(rows, tile.bm) * launch.cdiv(outer, tile.bn)
    return launch.Launch(
        gemm_glu_forward_kernel if forward else gemm_glu_backward_kernel, (launch.even_programs(tiles, device),), tile, tuple(made),
        F=features, K=inner, R=rank, **constants, ACTIVATION=activation, BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip


def _plan_of(x, features: int, s, layout, activation, *, forward: bool, dropout: bool = False) -> launch.Launch | None:
    rows, inner = x.shape
    if not rows or not hopper.compiles(NAME):
        return None
    return plan(rows, inner, features, 0 if s is None else s.shape[1], layout, activation, forward, dropout, x.dtype, x.device)


def forward(x, weight, s, b, layout, activation):
    """(gate and up [M, 2 F], hidden [M, F]) of x [M, K] and weight [2 F, K], or None where other kernels have to: arguments of
    :func:`fastlora.kernels.gemm.gemm` with ``transposed``, activation of ``ops.glu.ACTIVATIONS``."""
    rows, features = x.shape[0], weight.shape[0] // 2
    made = _plan_of(x, features, s, layout, activation, forward=True)
    if made is None:
        return None
    out, hidden = x.new_empty((rows, 2 * features)), x.new_empty((rows, features))
    done = attempt(NAME, made, x, weight, x if s is None else s, weight if b is None else b, out, hidden, rows)
    return (out, hidden) if done else None


def backward(dz, weight, ds, a, layout, activation, gate_up, dropout=None):
    """(gradient of ``gate_up`` [M, 2 F], hidden [M, F], bit-equal to the forward's) of dz [M, K] and weight [K, F], or None; ``dropout``: of
    the one adapter, or None."""
    rows, features = gate_up.shape[0], gate_up.shape[1] // 2
    made = _plan_of(dz, features, ds, layout, activation, forward=False, dropout=dropout is not None)
    if made is None:
        return None
    dgate_up, hidden = torch.empty_like(gate_up), gate_up.new_empty((rows, features))
    bits, scale = (dz, 1.0) if dropout is None else (masks(dropout, features), dropout.keep_scale)
    done = attempt(NAME, made, dz, weight, dz if ds is None else ds, weight if a is None else a, gate_up, dgate_up, hidden, bits, rows, scale, 1)
    return (dgate_up, hidden) if done else None
