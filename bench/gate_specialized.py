"""The compile gate's builds of the warp-specialised kernels, which are Gluon and for sm_90 alone."""

from __future__ import annotations

import torch

from bench.gate_flat import DRAWS
from fastlora.kernels import (
    attention_specialized,
    attention_specialized_keys,
    gemm_beside,
    gemm_dropout,
    gemm_glu,
    gemm_specialized,
    gemm_sums,
    hopper,
    masked,
    project_beside,
    project_dropout,
    sums_beside,
    tables,
)

ATTENTION = {
    "attention_forward_specialized": (attention_specialized, "forward_specialized_kernel"),
    "attention_dq_specialized": (attention_specialized, "dq_specialized_kernel"),
    "attention_dkv_specialized": (attention_specialized_keys, "dkv_specialized_kernel"),
}
# The GEMM by the width of its tile; the widest is the one that big products take.
GEMM = {f"gemm_specialized{'' if tile.bn == gemm_specialized.WIDEST else f'_{tile.bn}'}": tile for tile in tables.GEMM_SPECIALIZED}
# The products with a gate in their epilogue, by its activation; ``outer`` is the gate's width.
GLU = {f"gemm_glu_{activation}": activation for activation in ("silu", "gelu", "gelu_tanh")}
# The GEMM with S in its launch.
BESIDE = "gemm_beside"
# The backward's with dS and sums over tokens in its launch: dB, and dA.
SUMS = {"gemm_sums_b": False, "gemm_sums": True}
# The backward's with dropout in its epilogue, and with dS in its launch.
DROPOUT = {"gemm_dropout": False, "gemm_dropout_beside": True}
S_DROPPED = "project_dropout"
OPERATIONS = (S_DROPPED, *GEMM, BESIDE, *SUMS, *DROPOUT, *GLU, *ATTENTION)


def build_arguments(case, element: str, layout):
    """(kernel, tile, signature, constants) as the library launches it; ``element``: pointers to the dtype; ``layout``: of rank columns."""
    name = element.removeprefix("*")

    def block(rows, columns):
        return f"tensordesc<{name}[{rows}, {columns}],{hopper.layout_of(case.dtype, rows, columns)!r}>"

    if case.operation in ATTENTION:
        return _attention(case, element, block)
    if case.operation == S_DROPPED:
        return _s_dropped(case, element, block, layout)
    if case.operation in GLU:
        return _glu(case, block, layout)
    if case.operation in DROPOUT:
        return _dropout(case, element, block, layout)
    transposed = case.transposed and case.operation not in SUMS
    n, k = (case.outer, case.inner) if transposed else (case.inner, case.outer)
    tile = GEMM.get(case.operation, tables.GEMM_SPECIALIZED[-1])
    rank, second, third = gemm_specialized.rank_columns(layout, layout.columns, tile, transposed=transposed)
    signature = {which: block(*size) for which, size in gemm_specialized.blocks_of(tile, transposed=transposed).items()}
    signature |= {"p_bias": element, "M": "i32"}
    constants = dict(
        N=n, K=k, R=rank, SECOND=second, THIRD=third, TRANSPOSED=transposed, BIAS=case.dtype == torch.float16,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip
    if case.operation not in (BESIDE, *SUMS):
        return gemm_specialized.gemm_specialized_kernel, tile, signature, constants
    low = project_beside.low_of(layout, k, case.dtype, case.arch, transposed=transposed)
    signature |= {"d_f": block(*gemm_beside.factor_block(low, tile, transposed=transposed)), "helpers": "i32"}
    signature |= {"p_low": element, "p_scale": "*fp32", "p_ready": "*i32"}
    constants |= low.constants() | {"LR": layout.columns}
    if case.operation == BESIDE:
        return gemm_beside.gemm_beside_kernel, tile, signature, constants
    return _sums(case, block, layout, low, n, tile, signature, constants)


def _sums(case, block, layout, low, n, tile, signature, constants):
    """dX, whichever direction the case says."""
    with_a = SUMS[case.operation]
    pieces = sums_beside.pieces_of(layout, n, low, 16, 128, 132, with_a=with_a)
    signature |= dict.fromkeys(("d_dy", "d_in"), block(sums_beside.UNIT, sums_beside.FEATURES))
    signature |= {"d_of_b": block(sums_beside.UNIT, low.columns), "d_of_a": block(sums_beside.UNIT, pieces.columns)}
    signature |= dict.fromkeys(("p_db", "p_stats_b", "p_da", "p_stats_a"), "*i64") | dict.fromkeys(("first_b", "first_a"), "i64")
    signature |= {"p_table": "*i32", "units": "i32", "runs_b": "i32", "runs_a": "i32"}
    constants |= dict(SUMS=1 + with_a, RANK=case.rank, C_A=pieces.columns, GROUPS_A=pieces.groups, PER_A=pieces.per, ROWS=project_beside.MOST_ROWS)
    names = gemm_sums.gemm_sums_kernel.arg_names
    return gemm_sums.gemm_sums_kernel, tile, *({k: v for k, v in some.items() if k in names} for some in (signature, constants))


def _dropout(case, element: str, block, layout):
    """dX of ``outer`` features to ``inner``, whichever direction the case says: there is no other."""
    tile = tables.GEMM_SPECIALIZED[-1]
    places, depth = gemm_dropout.places_of(layout.count, layout.padded, tile)
    signature = {which: block(*size) for which, size in gemm_specialized.blocks_of(tile, transposed=False).items()}
    signature |= {"p_bits": "*i32", "M": "i32", "keep_scale": "fp32", "count": "i32"}
    beside = DROPOUT[case.operation]
    low = project_beside.low_of(layout, case.outer, case.dtype, case.arch, transposed=False, whole=True)
    factor = block(*gemm_beside.factor_block(low, tile, transposed=False)) if beside else element
    signature |= {"d_f": factor, "p_low": element, "p_scale": "*fp32", "p_ready": "*i32", "helpers": "i32"}
    constants = dict(
        N=case.inner, K=case.outer, PLACES=places, DEPTH=depth, BESIDE=beside, LR=layout.columns, **low.constants(),
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group,
    )  # fmt: skip
    return gemm_dropout.gemm_dropout_kernel, tile, signature, constants


def _s_dropped(case, element: str, block, layout):
    made = project_dropout.constants_of(case.inner, layout, case.dtype)
    edge = masked.BLOCK
    signature = {"d_x": block(edge, edge), "d_a": block(layout.padded, edge), "p_s": element, "p_scale": "*fp32"}
    signature |= {"M": "i32", "keep_scale": "fp32"} | DRAWS
    return project_dropout.project_dropout_kernel, project_dropout.tile_of(made["STAGES"]), signature, made


def _glu(case, block, layout):
    """The forward where ``transposed``, gate and up with an adapter each; else the backward."""
    tile = tables.GEMM_SPECIALIZED[-1]
    kernel = gemm_glu.gemm_glu_forward_kernel if case.transposed else gemm_glu.gemm_glu_backward_kernel
    rank, _, _ = gemm_specialized.rank_columns(layout, layout.columns, tile, transposed=False)
    signature = {which: block(*size) for which, size in gemm_glu.blocks_of(tile, forward=case.transposed).items()} | {"M": "i32"}
    dropout = {}
    if not case.transposed:
        signature |= {"p_bits": "*i32", "keep_scale": "fp32", "count": "i32"}
        places = gemm_dropout.places_of(1, layout.padded, tile) if case.dropout else (0, tile.bk)
        dropout, rank = dict(zip(("PLACES", "DEPTH"), places)), 0 if case.dropout else rank
    constants = dict(
        F=case.outer, K=case.inner, R=rank, **dropout, ACTIVATION=GLU[case.operation], BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages,
        GROUP=tile.group,
    )  # fmt: skip
    return kernel, tile, signature, constants


def _attention(case, element: str, block):
    """``outer`` is the head width, 8 query heads over 2 key heads."""
    file, kernel = ATTENTION[case.operation]
    kernel, tile, head = getattr(file, kernel), tables.attention_specialized_tile(), case.outer
    signature = dict.fromkeys(("d_q", "d_k", "d_v", "d_out", "d_do", "d_dq"), block(tile.bm, head))
    signature |= {"p_lse": "*fp32", "p_delta": "*fp32", "p_edges": "*i32", "p_dk": element, "p_dv": element}
    signature |= {"blocks": "i32", "total": "i32", "scale": "fp32"}
    constants = dict(
        HEADS=8, KEY_HEADS=2, GROUPS=4, D=head, B=tile.bm, STAGES=tile.stages, PROGRAMS=132, DK_T=2 * head, DV_T=2 * head,
    )  # fmt: skip
    return kernel, tile, *({k: v for k, v in some.items() if k in kernel.arg_names} for some in (signature, constants))


def all_cases(make) -> list:
    """The GEMM in both directions at the ranks of the other kernels, an edge, two steps of K, and fp16 with a bias; with each gate, in both
    directions; attention at its head widths; ``make`` is the gate's Case."""
    cases = [make("gemm_specialized", "sm_90", rank=rank, transposed=side) for rank in (16, 64, 256) for side in (True, False)]
    cases += [
        make("gemm_specialized", "sm_90", outer=1000, inner=1160), make("gemm_specialized", "sm_90", rank=64, inner=128),
        make("gemm_specialized", "sm_90", torch.float16), make("gemm_specialized", "sm_90", rank=64, outer=6144, count=3),
        make("gemm_specialized", "sm_90", rank=64, outer=6144, count=3, transposed=False),
    ]  # fmt: skip
    cases += [make(BESIDE, "sm_90", transposed=side) for side in (True, False)]
    cases += [make(BESIDE, "sm_90", rank=16, outer=6144, count=3, transposed=side) for side in (True, False)]
    cases += [make(BESIDE, "sm_90", torch.float16), *(make(BESIDE, "sm_90", rank=64, outer=6144, count=3, transposed=side) for side in (True, False))]
    cases += [make(sums, "sm_90", rank=rank, outer=6144, count=3, transposed=False) for sums in SUMS for rank in (16, 64)]
    cases += [make("gemm_sums", "sm_90", torch.float16, transposed=False)]
    cases += [make(S_DROPPED, "sm_90", rank=rank, outer=6144, count=count, dropout=True) for rank, count in ((16, 1), (16, 3), (64, 3), (128, 1))]
    cases += [make(S_DROPPED, "sm_90", torch.float16, dropout=True)]
    cases += [make("gemm_dropout", "sm_90", rank=rank, transposed=False, dropout=True) for rank in (16, 128)]
    cases += [make(dropped, "sm_90", rank=64, outer=6144, count=3, transposed=False, dropout=True) for dropped in DROPOUT]
    cases += [make(dropped, "sm_90", torch.float16, transposed=False, dropout=True) for dropped in DROPOUT]
    cases += [make("gemm_glu_silu", "sm_90", outer=14336, rank=rank, transposed=False, dropout=True) for rank in (16, 128)]
    cases += [make(narrow, "sm_90", transposed=side) for narrow in GEMM if narrow != "gemm_specialized" for side in (True, False)]
    cases += [make("gemm_glu_silu", "sm_90", outer=14336, rank=rank, transposed=side) for rank in (16, 128) for side in (True, False)]
    cases += [make("gemm_glu_silu", "sm_90", outer=14336, count=2), make("gemm_glu_silu", "sm_90", torch.float16, outer=14336, transposed=False)]
    cases += [make(gated, "sm_90", outer=14336, transposed=side) for gated in GLU if gated != "gemm_glu_silu" for side in (True, False)]
    heads = attention_specialized.HEADS_WIDE
    cases += [make(op, "sm_90", outer=head, inner=0) for op in ATTENTION for head in heads]
    return cases + [make(op, "sm_90", torch.float16, outer=heads[-1], inner=0) for op in ATTENTION]
