"""How the compile gate builds the attention kernels: ``outer`` is the head width, 8 query heads over 2 key heads."""

from __future__ import annotations

import torch

from fastlora.kernels import attention as file
from fastlora.kernels import tables

OPERATIONS = ("attention_forward", "attention_dq", "attention_dkv")
_POINTERS = {
    "attention_forward": ("p_q", "p_k", "p_v", "p_out"),
    "attention_dq": ("p_q", "p_k", "p_v", "p_dout", "p_dq"),
    "attention_dkv": ("p_q", "p_k", "p_v", "p_dout", "p_dk", "p_dv"),
}


def build_arguments(case, element: str):
    """(kernel, tile, signature, constants) of an attention case."""
    head, kernel = case.outer, getattr(file, f"{case.operation}_kernel")
    tile = tables.attention_tile(case.arch, case.dtype, head, of=case.operation.removeprefix("attention_"))
    signature = dict.fromkeys(_POINTERS[case.operation], element)
    signature |= {"p_lse": "*fp32", "p_delta": "*fp32", "p_first": "*i32", "p_last": "*i32"}
    signature |= {"T": "i32", "scale": "fp32", "window": "i32", "softcap": "fp32"}
    constants = dict(
        GROUPS=4, D=head, E=head, WINDOW=False, SOFTCAP=False, BD=max(16, head), BE=max(16, head), BQ=tile.bm, BK=tile.bn,
        PRECISION="ieee" if case.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    if case.operation == "attention_dkv":
        constants["APART"] = file.MASKS_APART
    for name in kernel.arg_names:
        if name.endswith(("_H", "_T")):
            heads = 2 if name[0] in "KV" or name.startswith(("DK", "DV")) else 8
            constants[name] = head if name.endswith("_H") else heads * head
    return kernel, tile, {k: v for k, v in signature.items() if k in kernel.arg_names}, constants
