"""LoRA on the output head, inside the fused loss: what a tile of rows adds to head and loss.

    S  = s D(h) A^T   [n, r]       logits  = h W^T + S B^T            [n, V]
    dS = s dlogits B  [n, r]       dh      = dlogits W + D'(dS A)     [n, H]
    dB = dlogits^T S  [V, r]       dA      = dS^T D(h)                [r, H]

The products are those of the LoRA linear (ops/reference.py; ops/triton_path.py), a tile at a time. dlogits live only while their
tile does, so the sums of dA and dB are made in the *forward*, into sums of this call; the backward adds them where they belong, so
that a forward alone adds nothing. Integers cannot be scaled afterwards: what multiplies the loss (row weights, ``gradient_scale``)
multiplies dlogits, and the backward tests that it is what came from above.

A partial sum holds rows of one document, however a batch was cut. On the torch path a tile never crosses a document. The kernels sum
over chunks that begin at multiples of 64 rows: each document's supervised rows are filled up to one with rows of zeros, whose S and
D(h) are 0, so they add nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastlora.errors import InputError
from fastlora.ops import backend, reference
from fastlora.ops import dropout as dropout_op
from fastlora.ops.dropout import DropoutKey
from fastlora.token_sum import TokenSum

# Partials of ordinary mode that wait to be added in order, in tiles: each is as large as B.
WAITING = 8


class HeadLora(NamedTuple):
    """An adapter on the head, for one call of :func:`fastlora.ops.linear_cross_entropy.linear_cross_entropy`.

    Attributes:
        a: [r, H]; b: [V, r]; fp32 masters or the hidden state's dtype. scale: alpha / r or alpha / sqrt(r).
        dropout, key: of D, with one token key for each of the M rows.
        sums: None: gradients go to ``.grad``. A pair of :class:`fastlora.exact.TokenSum`: exact sums, ``.grad`` stays empty.
        weights: fp32 [M], by which each row's gradient is multiplied (that of the hidden state too); None: 1.
        gradient_scale: a power of two; by what the loss will be multiplied before its backward. Exact sums must be told.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float = 0.0
    key: DropoutKey | None = None
    sums: tuple[TokenSum, TokenSum] | None = None
    weights: torch.Tensor | None = None
    gradient_scale: float = 1.0


def check(lora: HeadLora, rows: int) -> None:
    """Raise InputError for weights or a gradient scale that cannot be used; shapes are lora_linear's to check."""
    if lora.weights is not None and lora.weights.shape != (rows,):
        raise InputError(f"lora.weights {tuple(lora.weights.shape)}: one for each of {rows} rows")
    scale = lora.gradient_scale
    if not (0 < scale < math.inf and math.frexp(scale)[0] == 0.5):
        raise InputError(f"lora.gradient_scale is {scale}; allowed is a positive power of two")


def by_document(counts: tuple[int, ...], step: int) -> list[tuple[int, int]]:
    """(start, stop) of tiles of ``step`` rows, each document's from its own start."""
    tiles, start = [], 0
    for count in counts:
        tiles += [(low, min(low + step, start + count)) for low in range(start, start + count, step)]
        start += count
    return tiles


class Places(NamedTuple):
    """Where documents' rows stand when each is filled up to whole steps of the token sums.

    Attributes:
        rows: int64 [n], the place of each supervised row. total: rows with the filling.
        tiles: (start, stop) of each tile. spans: (start, stop) of the chunks in each tile, from its start.
    """

    rows: torch.Tensor
    total: int
    tiles: list[tuple[int, int]]
    spans: list[tuple[tuple[int, int], ...]]


def places(counts: tuple[int, ...], owner: torch.Tensor, step: int) -> Places:
    """:class:`Places` of ``counts`` supervised rows a document; ``owner`` int64 [n] names each row's.

    A piece is up to 512 rows of a document, from its start, and is cut into chunks as a document of its own (kernels/chunks.py). A
    tile holds whole pieces, as many as fit into ``step`` rows and one at least.
    """
    from fastlora.kernels.chunks import LONGEST, UNIT

    shifts, pieces, start, before = [], [], 0, 0
    for count in counts:
        shifts.append(start - before)
        before += count
        for low in range(0, count, LONGEST):
            stop = start + -(-min(LONGEST, count - low) // UNIT) * UNIT
            pieces.append((start, stop))
            start = stop
    tiles: list[list[tuple[int, int]]] = []
    for piece in pieces:
        if tiles and piece[1] - tiles[-1][0][0] <= step:
            tiles[-1].append(piece)
        else:
            tiles.append([piece])
    rows = torch.arange(len(owner), device=owner.device) + torch.tensor(shifts, device=owner.device)[owner]
    spans = [tuple((low - tile[0][0], high - tile[0][0]) for low, high in tile) for tile in tiles]
    return Places(rows, start, [(tile[0][0], tile[-1][1]) for tile in tiles], spans)


class HeadCall:
    """The adapter in one call of the fused loss: its operands, cast once, and the sums that its tiles add to.

    Args:
        lora: the adapter. hidden: [M, H], for dtype and device. rows: int64 [n], the supervised rows. owner: int64 [n], the
            document of each. counts: rows a document. step: rows of a tile.

    Attributes:
        tiles: (start, stop) over rows as :meth:`spread` puts them.
    """

    def __init__(self, lora: HeadLora, hidden: torch.Tensor, rows: torch.Tensor, owner: torch.Tensor, counts: tuple[int, ...],
                 step: int) -> None:  # fmt: skip
        self.lora, self.dtype = lora, hidden.dtype
        self.triton = backend.pick(hidden) == "triton"
        self.places = places(counts, owner, step) if self.triton else None
        self.tiles = self.places.tiles if self.triton else by_document(counts, step)
        self.number = {tile: i for i, tile in enumerate(self.tiles)}
        self.tokens = None if lora.dropout == 0.0 else self.spread(lora.key.tokens.index_select(0, rows))
        self.factors = None
        if lora.weights is not None or lora.gradient_scale != 1.0:
            weights = (
                torch.ones(len(rows), device=hidden.device)
                if lora.weights is None
                else lora.weights.index_select(0, rows)
            )
            self.factors = self.spread(weights * lora.gradient_scale)[:, None]
        if self.triton:
            from fastlora.ops import triton_path  # imported on first use: triton is absent on macOS and Windows

            self.a, self.b = triton_path.padded_factors(lora.a, lora.b, self.dtype)
        else:
            self.a, self.b = (reference.aligned(p.detach().to(self.dtype)).float() for p in (lora.a, lora.b))
        self.early: tuple[TokenSum, TokenSum] | None = None
        self.gradients: tuple[torch.Tensor, torch.Tensor] | None = None
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.needs_dh = False

    def begin(self, needs_dh: bool) -> None:
        """Before the tiles of a forward that has a backward; ``needs_dh``: whether the hidden state wants a gradient."""
        self.needs_dh, device = needs_dh, self.a.device
        if self.lora.sums is not None:
            self.early = tuple(TokenSum(p.shape, device) for p in (self.lora.a, self.lora.b))
        else:
            self.gradients = tuple(torch.zeros(p.shape, dtype=torch.float32, device=device) for p in (self.a, self.b))

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, ...] -> the same with rows of zeros where documents are filled up."""
        if self.places is None:
            return rows
        return rows.new_zeros(self.places.total, *rows.shape[1:]).index_copy_(0, self.places.rows, rows)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The opposite of :meth:`spread`."""
        return rows if self.places is None else rows.index_select(0, self.places.rows)

    def groups(self) -> list[list[tuple[int, int]]]:
        """Tiles that may be computed at the same time; :meth:`settle` comes after each group."""
        step = WAITING if self.gradients is not None else max(len(self.tiles), 1)
        return [self.tiles[i : i + step] for i in range(0, len(self.tiles), step)]

    def settle(self) -> None:
        """Ordinary mode: add what the tiles left, in their order, so that threads do not change it."""
        for number in sorted(self._waiting):
            for total, partial in zip(self.gradients, self._waiting[number]):
                total += partial
        self._waiting.clear()

    def add(self, number: int, da: torch.Tensor, db: torch.Tensor) -> None:
        """Take a tile's fp32 partials."""
        if self.early is None:
            self._waiting[number] = da, db
            return
        self.early[0].add_(da, number)
        self.early[1].add_(db, number)

    def tile(self, item: tuple[int, int]) -> HeadTile:
        """The adapter on rows ``item``."""
        return HeadTile(self, item)

    def finish(self, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """In the backward: (dA [r, H], dB [V, r]) in the parameters' dtypes, or None each, added to the exact sums.

        Raises:
            TrainingError: the exact block of the sums has ended.
        """
        lora = self.lora
        if self.early is not None:
            for total, early in zip(lora.sums, self.early):
                total.add_early(early, upstream, lora.gradient_scale)
            return None, None
        factor = (upstream / lora.gradient_scale).float()
        rank = lora.a.shape[0]
        da, db = self.gradients
        return (da[:rank] * factor).to(lora.a.dtype), (db[:, :rank] * factor).to(lora.b.dtype)


class HeadTile:
    """The adapter on one tile of rows."""

    def __init__(self, call: HeadCall, item: tuple[int, int]) -> None:
        self.call, self.number, self.part = call, call.number[item], slice(*item)
        self.factors = None if call.factors is None else call.factors[self.part]
        self.key = None if call.tokens is None else DropoutKey(call.lora.key.seed, call.tokens[self.part])

    # The torch path: three calls between those of the frozen head, see linear_cross_entropy._tile -----------------

    def add_logits(self, z: torch.Tensor, h: torch.Tensor) -> None:
        """z [n, V] fp32 += S B^T, from h [n, H]."""
        call, p = self.call, self.call.lora.dropout
        self.keep = None
        self.dropped = h.float()
        if self.key is not None:
            self.keep = dropout_op.keep_mask(self.key, h.shape[1], p)
            self.dropped = dropout_op.apply(h, self.keep, p).float()
        self.s = reference.low_rank_forward(self.dropped, call.a.t(), call.lora.scale, call.dtype)
        z.addmm_(self.s.float(), call.b.t())

    def take_gradient(self, dz: torch.Tensor) -> None:
        """dz [n, V] fp32, the gradient at h W^T + S B^T: multiplied by the rows' factors, then into dS and the sums."""
        call = self.call
        if self.factors is not None:
            dz.mul_(self.factors)
        self.ds, da, db = reference.low_rank_backward(dz, self.dropped, self.s, call.b, call.lora.scale, call.dtype)
        call.add(self.number, da, db)

    def add_dh(self, dh: torch.Tensor) -> None:
        """dh [n, H] fp32 += D'(dS A)."""
        reference.add_low_rank_dx(dh, self.ds, self.call.a, self.keep, self.call.lora.dropout)

    # The kernels ------------------------------------------------------------------------------------------------

    def run_triton(self, h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, terms, want_grad: bool):
        """(row losses fp32 [n], dh [n, H] or None) of h [n, H]: the LoRA linear's own forward and backward around the loss."""
        from fastlora.kernels.chunks import chunks_of
        from fastlora.kernels.cross_entropy import cross_entropy_
        from fastlora.ops import triton_path

        call, lora = self.call, self.call.lora
        logits, s = triton_path.forward_triton(h, weight, call.a, call.b, lora.scale, None, lora.dropout, self.key)
        losses = cross_entropy_(logits, labels, gradient=want_grad, **terms._asdict())
        if not want_grad:
            return losses, None
        if self.factors is not None:
            logits.mul_(self.factors)
        sums_a, sums_b = call.early or (None, None)
        dh, da, db = triton_path.backward_triton(
            logits, h, weight, call.a, call.b, s, lora.scale, lora.dropout, self.key, needs_dx=call.needs_dh, sums_a=sums_a,
            sums_b=sums_b, chunks=chunks_of(h.shape[0], call.places.spans[self.number], h.device),
        )  # fmt: skip
        if sums_a is None:
            call.add(self.number, da, db)
        return losses, dh
