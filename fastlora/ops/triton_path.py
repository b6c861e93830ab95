"""The LoRA linear by Triton kernels: the same signatures as ops/reference.py, on padded ranks.

S, dS and the 16-bit copies of A and B are stored with the rank padded to a power of two of at least 16 (zeros), so no kernel masks the
rank and the matrix instruction's depth is always full.
"""

from __future__ import annotations

import torch

from fastlora import stream
from fastlora.kernels.chunks import Chunks, chunks_of
from fastlora.kernels.columns import single
from fastlora.kernels.factors import copy_factors
from fastlora.kernels.gemm import gemm
from fastlora.kernels.gemm_beside import run as gemm_with_low
from fastlora.kernels.gemm_dropout import run_with_low as gemm_dropout_with_low
from fastlora.kernels.gemm_sums import run as gemm_with_sums
from fastlora.kernels.launch import Dropout, arch_of, padded_rank
from fastlora.kernels.project import project
from fastlora.kernels.sums_beside import Sums
from fastlora.kernels.tables import DS_IN_TOKEN_SUM_MAX_RANK, TMA_ARCHITECTURES
from fastlora.kernels.token_sum import sum_a, sum_b
from fastlora.ops.beside import Beside, Later
from fastlora.ops.dropout import keep_scale, threshold


def kernel_ready(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned: itself if it is so already, else a copy.

    Triton specialises a binary on the alignment of pointers; a copy keeps one binary, and one set of bits.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def kernel_dropout(p: float, seeds: tuple[int, ...], tokens: torch.Tensor) -> Dropout:
    """What the kernels are told of a dropout: a seed a projection, a key a token."""
    return Dropout(threshold(p), keep_scale(p), seeds, kernel_ready(tokens))


def _dropout(p: float, key) -> Dropout | None:
    return None if p == 0.0 else kernel_dropout(p, (key.seed,), key.tokens)


def padded_factors(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] cast to ``dtype`` and padded with zeros; themselves, where they are so already."""
    a, b = kernel_ready(a), kernel_ready(b)
    done = a.dtype == dtype == b.dtype and a.shape[0] == padded_rank(a.shape[0])
    return (a, b) if done else copy_factors(a, b, dtype)


def forward_triton(x, weight, a, b, scale, bias=None, dropout=0.0, key=None):
    """(y [M, N], s [M, R]); a and b are those of :func:`padded_factors`, R their padded rank. See ``reference.forward_ref``."""
    x, weight = kernel_ready(x), kernel_ready(weight)
    bias = None if bias is None else kernel_ready(bias)
    return products_forward(x, weight, a, b, bias, single(a.shape[0], weight.shape[0], scale), _dropout(dropout, key))


def products_forward(x, weight, a, b, bias, layout, dropout):
    """(y [M, N], s [M, columns]) of the projections of ``layout``: in one launch where tiles leave room for s."""
    if dropout is None:
        made = gemm_with_low(x, weight, a, b, bias, transposed=True, layout=layout)
        if made is not None:
            return made
    s = project(x, a, layout, dropout)
    return gemm(x, weight, s, b, bias, transposed=True, layout=layout), s


def backward_triton(
    dy, x, weight, a, b, s, scale, dropout=0.0, key=None, *, rank=None, needs_dx=True, sums_a=None, sums_b=None, chunks=None
):
    """(dx or None, da or None, db or None); a and b as in the forward. See ``reference.backward_ref``.

    ``rank``: rows of da and columns of db; None: those of the sums, or the padded rank without sums. ``chunks``: of the token sums, None:
    those of the stream.
    """
    # what hooks on saved tensors hand back may lie anywhere
    dy, x, weight, a, b, s = [kernel_ready(tensor) for tensor in (dy, x, weight, a, b, s)]
    if rank is None:
        rank = a.shape[0] if sums_a is None else sums_a.total.shape[0]
    drop = _dropout(dropout, key)
    layout = single(rank, dy.shape[1], scale)
    chunks = chunks_here(dy) if chunks is None else chunks
    if not needs_dx:
        db, ds = low_rank_gradients(dy, s, b, layout, chunks, sums_b, drop)
        return None, sum_a(x, ds, layout, chunks, sink=sums_a, dropout=drop), db
    with Beside(dy.device) as beside:
        dx, ds, db = products_backward(dy, s, weight, a, b, layout, drop, chunks, sums_b, beside, x, sums_a)
        da = None if ds is None else sum_a(x, ds, layout, chunks, sink=sums_a, dropout=drop)
    return dx, da, db.value


def products_backward(dy, s, weight, a, b, layout, dropout, chunks, sink, beside, x=None, sink_a=None):
    """(dx [M, K], ds [M, columns], db as of :class:`fastlora.ops.beside.Later`: None with a sink) of the projections of ``layout``.

    What waits in ``beside`` runs beside the product of dx, and so does db where ds is made in its launch or, under dropout, before it. Exact
    sums may be made in that launch too: db then, and with ``x`` [M, K] da, whose sink is ``sink_a``. ds is None if da has been added.
    """
    with beside.product(dy.shape[0] * weight.numel()):
        if dropout is None:
            made = None if sink is None else gemm_with_sums(dy, weight, b, a, layout, Sums(chunks, s, sink, x, sink_a))
            if made is not None:
                return made[0], made[1] if x is None else None, Later(None)
            made = gemm_with_low(dy, weight, b, a, None, transposed=False, layout=layout)
            if made is not None:
                return *made, beside.add(_db, dy, s, layout, chunks, sink)
        elif (made := gemm_dropout_with_low(dy, weight, b, a, dropout, layout)) is not None:
            return *made, beside.add(_db, dy, s, layout, chunks, sink)
        ds, db = low_backward(dy, s, b, layout, dropout, chunks, sink, beside)
        return gemm(dy, weight, ds, a, transposed=False, dropout=dropout, layout=layout), ds, db


def low_backward(dy, s, b, layout, dropout, chunks, sink, beside):
    """(ds [M, columns], db as of :func:`products_backward`)."""
    if dropout is None or not ds_apart(dy, layout, dropout):
        db, ds = low_rank_gradients(dy, s, b, layout, chunks, sink, dropout)
        return ds, Later(None, db)
    return project(dy, b, layout, transposed=True), beside.add(_db, dy, s, layout, chunks, sink)


def _db(dy, s, layout, chunks, sink):
    return sum_b(dy, s, layout, chunks, sink=sink)[0]


def chunks_here(rows: torch.Tensor) -> Chunks:
    """Chunks of the token sums: those of the active stream if the tensor's rows are its tokens, else fixed ones."""
    current, count, device = stream.active(), rows.shape[0], rows.device
    if current is None or current.total != count:
        return chunks_of(count, None, device)
    # kept with the stream: to look up spans is to hash each of them
    found = current.chunks.get(device)
    if found is None:
        found = current.chunks[device] = chunks_of(count, current.spans, device)
    return found


def low_rank_gradients(dy, s, b, layout, chunks, sink, dropout=None):
    """(dB or None with a sink, dS), see :func:`ds_apart`."""
    if not ds_apart(dy, layout, dropout):
        return sum_b(dy, s, layout, chunks, sink=sink, b=b)
    ds = project(dy, b, layout, transposed=True)
    return _db(dy, s, layout, chunks, sink), ds


def ds_apart(dy, layout, dropout) -> bool:
    """Whether dS has a pass over dY of its own, without dB.

    Above a rank it has: partials of dS would cost more traffic than a second pass. And under dropout on GPUs with persistent grids: the
    product that needs dS starts sooner then, and dB runs beside it.
    """
    return layout.padded > DS_IN_TOKEN_SUM_MAX_RANK or (dropout is not None and arch_of(dy) in TMA_ARCHITECTURES)


def frozen_forward(x, weight, bias=None):
    """Y = x W^T + bias, [M, N]: the same GEMM without a rank-r product."""
    bias = None if bias is None else kernel_ready(bias)
    return gemm(kernel_ready(x), kernel_ready(weight), bias=bias, transposed=True)


def frozen_backward(dy, weight):
    """dX = dY W, [M, K]."""
    return gemm(kernel_ready(dy), kernel_ready(weight), transposed=False)
