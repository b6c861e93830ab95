"""The kernels' dropout masks against the torch reference, bit for bit: on a GPU and in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import launch, masks
from fastlora.kernels.tile import keep_mask, keep_mask_of_product
from fastlora.ops import dropout

SEEDS = (0, 2**31 + 5, 2**32 - 1, 2**61 + 2**32 - 1, 2**63 - 1)
PROBABILITIES = (2**-16, 0.1, 0.5, 1 - 2**-16)


@triton.jit
def mask_kernel(p_out, p_token, M, F, i_feature, seed: tl.int64, threshold: tl.int64, PRODUCT: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """p_out int8 [M, F], of which features i_feature to i_feature + BF are written."""
    o_m, o_f = tl.arange(0, BM), i_feature + tl.arange(0, BF)
    b_token = tl.load(p_token + o_m, mask=o_m < M, other=0)
    if PRODUCT:
        b_keep = keep_mask_of_product(b_token, i_feature, seed, threshold, BM, BF)
    else:
        b_keep = keep_mask(b_token, i_feature, seed, threshold, BM, BF)
    tl.store(p_out + o_m[:, None] * F + o_f[None, :], b_keep.to(tl.int8), mask=(o_m[:, None] < M) & (o_f[None, :] < F))


def check(device: str, *, product: bool, block: int) -> None:
    """Every seed and probability on 30 tokens and 77 features, in blocks of ``block`` features."""
    pen = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.tensor([0, -1, -(2**63), 2**63 - 1]), torch.randint(-(2**62), 2**62, (26,), generator=pen)])
    for seed in SEEDS:
        for p in PROBABILITIES:
            wanted = dropout.keep_mask(dropout.DropoutKey(seed, tokens), 77, p)
            found = torch.zeros(30, 77, dtype=torch.int8, device=device)
            for first in range(0, 77, block):
                mask_kernel[(1,)](
                    found, tokens.to(device), 30, 77, first, seed, dropout.threshold(p) << 16, PRODUCT=product, BM=32, BF=block
                )
            assert torch.equal(found.cpu().bool(), wanted), (seed, p)


def check_bits(device: str, features: int) -> None:
    """The masks of three projections as bits, of 37 tokens."""
    pen = torch.Generator().manual_seed(features)
    tokens = torch.randint(-(2**62), 2**62, (37,), generator=pen)
    for p in PROBABILITIES:
        drop = launch.Dropout(dropout.threshold(p), dropout.keep_scale(p), SEEDS[1:4], tokens.to(device))
        bits = masks.masks(drop, features).cpu()
        assert bits.shape == (3, 37, 2 * -(-features // 64))
        o_f = torch.arange(features)
        for seed, of_seed in zip(drop.seeds, bits, strict=True):
            found = (of_seed[:, o_f // 32] >> (o_f % 32)) & 1
            assert torch.equal(found.bool(), dropout.keep_mask(dropout.DropoutKey(seed, tokens), features, p)), (seed, p)
