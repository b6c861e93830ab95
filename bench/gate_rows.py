"""How the compile gate builds the row-wise kernels, in the variant that keeps most in registers.

Norms: ``outer`` is the width. The loss: ``outer`` is the vocabulary. RoPE and the norm of heads: ``outer`` is the head's width, ``inner``
the number of heads. Gates: ``outer`` is the width of a half, the activation is part of the operation's name.
"""

from __future__ import annotations

import torch

from fastlora.kernels import cross_entropy, glu, rms_norm, rope, row_tables
from fastlora.kernels.launch import cdiv

_GATES = tuple(f"glu_{way}_{act}" for way in ("forward", "backward") for act in ("silu", "gelu", "gelu_tanh"))
OPERATIONS = ("norm_forward", "norm_backward", "rope", "head_norm_forward", "head_norm_backward", "cross_entropy", *_GATES)
_TYPES = {"p_rstd": "*fp32", "p_loss": "*fp32", "p_labels": "*i64", "softcap": "fp32", "smoothing": "fp32", "z_loss": "fp32"}


def _norm(case):
    backward = case.operation == "norm_backward"
    tile = row_tables.norm_tile(case.arch, case.dtype, case.outer)
    own = dict(RESIDUAL=True, EMIT=True, AGAIN=row_tables.reads_again(case.dtype, case.outer)) if backward else dict(ADD=True, SCALED=True)
    kernel = getattr(rms_norm, f"{case.operation}_kernel")
    strides = {name: case.outer for name in ("H_LD", "X_LD", "DX_LD", "DH_LD") if name in kernel.arg_names}
    return kernel, tile, dict(**strides, K=case.outer, **own, STYLE="round_first", BM=tile.bm, BK=tile.bk)


def _heads(case):
    kernel = getattr(rope, f"{case.operation}_kernel")
    tile = row_tables.head_tile(case.arch, case.dtype, case.inner, case.outer)
    half, stride = case.outer // 2, case.outer * (case.inner + 8)
    every = dict(
        LD=stride, GRAD_LD=stride, Q=case.inner - 2, HEADS=case.inner, D=case.outer, HALF=half, INVERSE=False, STYLE="round_first",
        BLOCKS=cdiv(case.inner, tile.bm), BH=tile.bm, BD=row_tables.power_of_two(half), BR=1,
    )  # fmt: skip
    return kernel, tile, {name: value for name, value in every.items() if name in kernel.arg_names}


def _gate(case):
    _, way, activation = case.operation.split("_", 2)
    tile = row_tables.glu_tile(case.arch, case.dtype, case.outer)
    constants = dict(
        F=case.outer, LD=2 * case.outer, UP=case.outer, ACTIVATION=activation, BLOCKS=cdiv(case.outer, tile.bn), BF=tile.bn
    )
    return getattr(glu, f"glu_{way}_kernel"), tile, constants | ({"EMIT": True} if way == "backward" else {})


def _loss(case):
    tile = row_tables.cross_entropy_tile(case.arch)
    constants = dict(V=case.outer, SOFTCAP=True, SMOOTH=True, ZLOSS=True, GRADIENT=True, BV=tile.bn, EACH=tile.bk)
    return cross_entropy.cross_entropy_kernel, tile, constants


def build_arguments(case, element: str):
    """(kernel, tile, signature, constants) of a row-wise case."""
    own = dict.fromkeys(_GATES, _gate) | dict.fromkeys(("norm_forward", "norm_backward"), _norm) | {"cross_entropy": _loss}
    kernel, tile, constants = own.get(case.operation, _heads)(case)
    signature = {"M": "i32", "eps": "fp32", "scale": "fp32"}
    signature |= {name: element for name in kernel.arg_names if name.startswith("p_")} | _TYPES
    return kernel, tile, {k: v for k, v in signature.items() if k in kernel.arg_names}, constants


def all_cases(make) -> list:
    """Every row-wise case, by ``make(operation, arch, dtype, outer=, inner=)``."""
    from fastlora.kernels.tables import ARCHITECTURES

    cases = []
    for arch in ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float32):
            for op in ("norm_forward", "norm_backward"):
                cases += [make(op, arch, dtype, outer=width, inner=0) for width in (128, 576, 4096, 8192, 16384)]
            for op in ("rope", "head_norm_forward", "head_norm_backward"):
                shapes = ((40, 128), (12, 64), (8, 256))
                cases += [make(op, arch, dtype, outer=head, inner=heads) for heads, head in shapes]
            cases += [make(op, arch, dtype, outer=14336, inner=0) for op in _GATES]
            cases += [make("cross_entropy", arch, dtype, outer=128256, inner=0)]
        cases += [make(op, arch, torch.bfloat16, outer=width, inner=0) for op in _GATES[::3] for width in (1536, 1001)]
    return cases


def loads_16_bytes(ptx: str) -> bool:
    """Whether the kernel loads 16 bytes at a time, as it should where rows are multiples of 16 bytes."""
    return any(f"ld.global{order}.{kind}" in ptx for order in ("", ".L1::evict_last") for kind in ("v4.b32", "v2.b64", "b128"))
