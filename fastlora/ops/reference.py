"""The LoRA linear in plain torch: the maths, the CPU path, and what the kernels are held against.

    S  = s D(x) A^T   [M,r]        Y  = x W^T + S B^T + bias      [M,N]
    dS = s dY B       [M,r]        dX = dY W + D'(dS A)           [M,K]
    dB = dY^T S       [N,r]        dA = dS^T D(x)                 [r,K]   (sums over tokens)

On CPU every product runs over the fixed tiles of ``stream.tiles``, a tile on one thread, so a row's
bits depend on its document alone. Products accumulate in fp32; S and dS are scaled in fp32 and
rounded once to ``x.dtype``. Source: Hu et al., "LoRA" (2021); the order of arithmetic is this
library's.
"""

from __future__ import annotations

import torch

from fastlora import blocks, stream
from fastlora.errors import InputError
from fastlora.ops import dropout as dropout_op
from fastlora.ops.dropout import DropoutKey

ALIGN_BYTES = 64


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if it is contiguous and (on CPU) begins at a 64-byte line, else a copy that
    does.
    """
    x = x.contiguous()
    if x.device.type == "cpu" and x.data_ptr() % ALIGN_BYTES and x.numel():
        return x.clone()
    return x


def over_tiles(fn, tiles, device: torch.device) -> None:
    """Call ``fn((index, start, stop))`` for every tile: on CPU spread by ``blocks.run``, else one
    after another.
    """
    items = [(index, start, stop) for index, (start, stop) in enumerate(tiles)]
    if device.type == "cpu":
        blocks.run(fn, items)
    else:
        for item in items:
            fn(item)


def _dropped(
    x: torch.Tensor, p: float, key: DropoutKey | None, start: int, stop: int
) -> torch.Tensor:
    """D(x) of one tile in fp32 (its values are those of ``x.dtype``)."""
    if p == 0.0:
        return x.float()
    keep = dropout_op.keep_mask(key.rows(start, stop), x.shape[1], p)
    return dropout_op.apply(x, keep, p).float()


def _check_key(dropout: float, key: DropoutKey | None, rows: int) -> None:
    dropout_op.check_probability(dropout)
    if dropout > 0.0 and (key is None or key.tokens.shape[0] != rows):
        have = "no key" if key is None else f"a key of {key.tokens.shape[0]} tokens"
        raise InputError(f"dropout is {dropout} with {have}; it needs a key of {rows} tokens")


def low_rank_forward(
    dropped: torch.Tensor, at: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """S [m, r] of one tile, rounded once to ``dtype``, from D(x) [m, K] and A^T [K, r] in fp32."""
    return torch.mm(dropped, at).mul_(scale).to(dtype)


def low_rank_backward(
    dy: torch.Tensor,
    dropped: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dS [m, r] rounded once to ``dtype``, dA [r, K], dB [N, r]) of one tile, in fp32.

    From dy [m, N], D(x) [m, K] and B [N, r] in fp32 and the forward's S [m, r].
    """
    ds = torch.mm(dy, b).mul_(scale).to(dtype).float()
    db = torch.mm(dy.t(), s.float())
    da = torch.mm(ds.t(), dropped)
    return ds, da, db


def add_low_rank_dx(
    dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, keep: torch.Tensor | None, p: float
) -> None:
    """dx [m, K] += D'(dS A) of one tile, all fp32; ``keep`` is the mask of D, None without dropout."""
    if keep is None:
        dx.addmm_(ds, a)
    else:
        dx += torch.where(keep, torch.mm(ds, a) * dropout_op.keep_scale(p), 0.0)


def forward_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M,N], s [M,r]) in ``x.dtype`` from x [M,K], weight [N,K], a [r,K], b [N,r], bias [N].

    ``a`` and ``b`` may be fp32 masters; they are rounded to ``x.dtype`` first. ``y`` is rounded
    once.

    Raises:
        InputError: dropout not allowed, or without a key of M tokens.
    """
    rows, dtype = x.shape[0], x.dtype
    _check_key(dropout, key, rows)
    x, weight = aligned(x), aligned(weight)
    at = aligned(a.detach().to(dtype)).float().t()
    bt = aligned(b.detach().to(dtype)).float().t()
    wt = weight.float().t()
    bias32 = None if bias is None else bias.float()
    y, s = x.new_empty(rows, weight.shape[0]), x.new_empty(rows, a.shape[0])

    def tile(item: tuple[int, int, int]) -> None:
        _, start, stop = item
        xt = x[start:stop]
        st = low_rank_forward(_dropped(xt, dropout, key, start, stop), at, scale, dtype)
        s[start:stop] = st
        out = y[start:stop]
        if dtype == torch.float32:
            torch.mm(xt, wt, out=out)
        else:
            out = torch.mm(xt.float(), wt)
        out.addmm_(st.float(), bt)
        if bias32 is not None:
            out += bias32
        if dtype != torch.float32:
            y[start:stop] = out

    over_tiles(tile, stream.tiles(rows), x.device)
    return y, s


def backward_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    key: DropoutKey | None = None,
    *,
    needs_dx: bool = True,
    sums_a=None,
    sums_b=None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx [M,K] in ``x.dtype`` or None, dA [r,K], dB [N,r]) from dy [M,N] and what the forward
    saved.

    With ``sums_a`` and ``sums_b`` (``exact.TokenSum``) each tile's fp32 partial is added to them
    and dA, dB are None; otherwise they are the fp32 sums of the partials in tile order.

    Raises:
        InputError: dropout not allowed, or without a key of M tokens.
    """
    rows, dtype = x.shape[0], x.dtype
    _check_key(dropout, key, rows)
    dy, x, s, weight = aligned(dy), aligned(x), aligned(s), aligned(weight)
    a32, b32 = aligned(a.detach().to(dtype)).float(), aligned(b.detach().to(dtype)).float()
    w32 = weight.float() if needs_dx else None
    dx = torch.empty_like(x) if needs_dx else None
    tiles = stream.tiles(rows)
    partials: list = [None] * len(tiles)

    def tile(item: tuple[int, int, int]) -> None:
        index, start, stop = item
        dyt, xt = dy[start:stop].float(), x[start:stop]
        keep = None
        if dropout > 0.0:
            keep = dropout_op.keep_mask(key.rows(start, stop), x.shape[1], dropout)
            xt = dropout_op.apply(xt, keep, dropout)
        dst, da, db = low_rank_backward(dyt, xt.float(), s[start:stop], b32, scale, dtype)
        if sums_a is not None:
            sums_a.add_(da, index)
            sums_b.add_(db, index)
        else:
            partials[index] = (da, db)
        if not needs_dx:
            return
        fp32 = dtype == torch.float32
        out = dx[start:stop] if fp32 else torch.empty_like(xt, dtype=torch.float32)
        torch.mm(dyt, w32, out=out)
        add_low_rank_dx(out, dst, a32, keep, dropout)
        if dtype != torch.float32:
            dx[start:stop] = out

    over_tiles(tile, tiles, x.device)
    if sums_a is not None:
        return dx, None, None
    da_sum = torch.zeros(a.shape, dtype=torch.float32, device=x.device)
    db_sum = torch.zeros(b.shape, dtype=torch.float32, device=x.device)
    for da, db in partials:
        da_sum += da
        db_sum += db
    return dx, da_sum, db_sum
