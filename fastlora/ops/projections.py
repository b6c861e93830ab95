"""Linear layers that read one input, as one product: query, key and value; gate and up; or one by itself.

    S  = s * D(x) A^T     [M, columns]      Y  = x W^T + S B^T + bias     [M, N]
    dS = s * dY B         [M, columns]      dX = dY W + D'(dS A)          [M, K]
    dB = dY^T S                             dA = dS^T D(x)

W holds the layers' weights one below the other, and each layer's own weight is a view of its rows: there is no second copy and the
state dict does not change. A has the layers' A below each other, B is block-diagonal, so one product serves any subset of layers
with adapters, each of its own rank and scaling. 16-bit copies of A and B are made again when the parameters have changed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from fastlora.errors import InputError
from fastlora.kernels.chunks import Chunks
from fastlora.kernels.columns import Columns
from fastlora.kernels.gemm import gemm
from fastlora.kernels.launch import Dropout
from fastlora.kernels.project import project
from fastlora.kernels.token_sum import Sink, sum_a
from fastlora.ops.beside import Beside, Later
from fastlora.ops.dropout import module_key
from fastlora.ops.triton_path import kernel_dropout, low_backward, products_backward, products_forward
from fastlora.stream import Stream
from fastlora.token_sum import TokenSum


class Projections:
    """The layers, and what the kernels read of them.

    Args:
        modules: nn.Linear or LoraLinear with frozen weights, up to three, of one input width.

    Attributes:
        adapted: the layers that have an adapter. starts: first output feature of each layer. features: N, all of them.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = tuple(modules)
        widths = [m.out_features for m in self.modules]
        self.starts = [sum(widths[:i]) for i in range(len(widths))]
        self.features = sum(widths)
        self.adapted = tuple(m for m in self.modules if hasattr(m, "lora_A"))
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._bias_of: tuple = ()
        self._seen: tuple = ()
        self._sinks: tuple[Sink, Sink] | None = None
        self._parts: list[tuple[TokenSum, TokenSum]] = []
        self.layout: Columns | None = None
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    def attach(self) -> None:
        """From now on the layers' exact sums are views of the group's."""
        for place, module in enumerate(self.adapted):
            module.sums_from = functools.partial(self._sums, place)

    def undo(self) -> None:
        """Give each layer sums and, where weights were put together, a weight of its own again."""
        for module in self.adapted:
            module.sums_from, module.sums = None, None
        if len(self.modules) > 1 and self.weight is not None:
            for module in self.modules:
                module.weight.data = module.weight.data.clone()
        self.weight = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer with an adapter, in order."""
        return [p for m in self.adapted for p in (m.lora_A.weight, m.lora_B.weight)]

    # What kernels read ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Bring weights together and 16-bit copies up to date, if anything changed since the last call."""
        first = self.modules[0].weight
        if self.weight is None or not self._together():
            self._put_together()
        biases = tuple(m.bias for m in self.modules)
        if any(b is not None for b in biases):
            seen = tuple(None if b is None else (b.data_ptr(), b._version) for b in biases)
            if seen != self._bias_of:
                parts = [first.new_zeros(m.out_features) if b is None else b.detach() for m, b in zip(self.modules, biases)]
                self.bias, self._bias_of = torch.cat(parts), seen
        seen = (first.dtype, first.device, *((p._version, p.data_ptr()) for p in self.parameters), *(m.scaling for m in self.adapted))
        if seen != self._seen:
            self._cast(first)
            self._seen = seen

    def unchanged(self) -> bool:
        """Whether A and B are what the last :meth:`prepare` saw."""
        return self._seen[2 : 2 + 2 * len(self.adapted)] == tuple((p._version, p.data_ptr()) for p in self.parameters)

    def _together(self) -> bool:
        at, size = self.weight.data_ptr(), self.weight.shape[1] * self.weight.element_size()
        return all(
            m.weight.data_ptr() == at + start * size and m.weight.dtype == self.weight.dtype
            for m, start in zip(self.modules, self.starts)
        )

    @torch.no_grad()
    def _put_together(self) -> None:
        if len(self.modules) == 1:
            weight = self.modules[0].weight.detach()
            self.weight = weight if weight.is_contiguous() and weight.data_ptr() % 16 == 0 else weight.contiguous().clone()
            self.modules[0].weight.data = self.weight
            return
        self.weight = torch.cat([m.weight.detach() for m in self.modules])
        for module, start in zip(self.modules, self.starts):
            module.weight.data = self.weight[start : start + module.out_features]

    @torch.no_grad()
    def _cast(self, like: torch.Tensor) -> None:
        if not self.adapted:
            return
        spans = [(start, m.out_features) for m, start in zip(self.modules, self.starts) if hasattr(m, "lora_A")]
        layout = Columns(tuple(m.rank for m in self.adapted), *zip(*spans), tuple(float(m.scaling) for m in self.adapted))
        if layout != self.layout or self.a.dtype != like.dtype or self.a.device != like.device:
            self.layout = layout
            self.a = like.new_zeros(layout.columns, like.shape[1])
            self.b = like.new_zeros(self.features, layout.columns)
            self._views = []
            for place, ((start, width), rank) in enumerate(zip(spans, layout.ranks)):
                columns = slice(place * layout.padded, place * layout.padded + rank)
                self._views += [self.a[columns], self.b[start : start + width, columns]]
        torch._foreach_copy_(self._views, [p.detach() for p in self.parameters])

    # Exact sums ----------------------------------------------------------------------------------------------

    def _sums(self, place: int) -> tuple[TokenSum, TokenSum]:
        """The sums of one layer: views of the buffers that the group's kernels add to."""
        device = self.modules[0].weight.device
        if self._sinks is None or self._sinks[0].total.device != device:
            self._sinks = self._make_sinks(device)
            self._parts = list(zip(*(sink.parts for sink in self._sinks)))
        return self._parts[place]

    def _make_sinks(self, device: torch.device) -> tuple[Sink, Sink]:
        ranks, count = [m.rank for m in self.adapted], len(self.adapted)
        rank, inner = max(ranks), self.modules[0].in_features
        a = torch.zeros(count * rank, inner, dtype=torch.int64, device=device)
        b = torch.zeros(self.features, rank, dtype=torch.int64, device=device)
        starts = [start for m, start in zip(self.modules, self.starts) if hasattr(m, "lora_A")]
        sinks = []
        for total, views in (
            (a, [a[i * rank : i * rank + r] for i, r in enumerate(ranks)]),
            (b, [b[start : start + m.out_features, :r] for m, start, r in zip(self.adapted, starts, ranks)]),
        ):
            stats = torch.zeros(count, 4, dtype=torch.int64, device=device)
            parts = tuple(TokenSum.over(view, stats[i]) for i, view in enumerate(views))
            sinks.append(Sink(total, stats, parts))
        return tuple(sinks)

    def sinks(self) -> tuple[Sink, Sink] | None:
        """(of dA, of dB) inside an exact block, else None.

        Raises:
            InputError: some layers are in exact mode and others not.
        """
        modes = {m.exact for m in self.adapted}
        if modes == {False}:
            return None
        if modes != {True}:
            raise InputError(f"{[m.path for m in self.adapted]}: some are in exact mode and others not; allowed: all or none")
        if self._sinks is None:
            raise InputError(f"{[m.path for m in self.adapted]}: exact sums were opened before these layers were fused")
        return self._sinks

    # The products --------------------------------------------------------------------------------------------

    def dropout(self, stream: Stream, device: torch.device) -> Dropout | None:
        """The masks of this call, or None."""
        first = self.adapted[0] if self.adapted else None
        if first is None or not first.training or first.lora_dropout == 0.0:
            return None
        seeds = tuple(module_key(stream.seed, stream.step, m.path) for m in self.adapted)
        return kernel_dropout(first.lora_dropout, seeds, stream.token_keys(device))

    def low(self, x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor | None:
        """x [M, K] -> s [M, columns], or None without an adapter."""
        return project(x, self.a, self.layout, dropout) if self.adapted else None

    def forward(self, x: torch.Tensor, dropout: Dropout | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [M, K] -> (y [M, N], s as of :meth:`low`)."""
        if not self.adapted:
            return self.product(x, None), None
        return products_forward(x, self.weight, self.a, self.b, self.bias, self.layout, dropout)

    def product(self, x: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        """x [M, K] and s of :meth:`low` -> y [M, N]."""
        return gemm(x, self.weight, s, self.b, self.bias, transposed=True, layout=self.layout)

    def _sink_b(self) -> Sink | None:
        sinks = self.sinks()
        return None if sinks is None else sinks[1]

    def low_backward(
        self, dy: torch.Tensor, s: torch.Tensor | None, dropout: Dropout | None, chunks: Chunks, beside: Beside
    ) -> tuple[torch.Tensor | None, Later | None]:
        """dy [M, N] -> (ds [M, columns], db for :meth:`gradients`), or (None, None) without an adapter."""
        if not self.adapted:
            return None, None
        return low_backward(dy, s, self.b, self.layout, dropout, chunks, self._sink_b(), beside)

    def dx(self, dy: torch.Tensor, ds: torch.Tensor | None, dropout: Dropout | None) -> torch.Tensor:
        """dy [M, N] and ds of :meth:`low_backward` -> dx [M, K]."""
        return gemm(dy, self.weight, ds, self.a, transposed=False, dropout=dropout, layout=self.layout)

    def backward(
        self, dy: torch.Tensor, s: torch.Tensor | None, dropout: Dropout | None, chunks: Chunks, beside: Beside, x: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Later | None]:
        """dy [M, N] -> (dx [M, K], ds, db): ds and db go to :meth:`gradients`. What waits in ``beside`` runs beside the product.

        ``x``: the input, where it is there already; the product's launch may add dA to the sums then, and ds is None.
        """
        if self.adapted:
            sink_a, sink_b = self.sinks() or (None, None)
            return products_backward(dy, s, self.weight, self.a, self.b, self.layout, dropout, chunks, sink_b, beside, x, sink_a)
        with beside.product(dy.shape[0] * self.weight.numel()):
            return self.dx(dy, None, None), None, None

    def gradients(
        self, x: torch.Tensor, ds: torch.Tensor | None, db: Later | None, dropout: Dropout | None, chunks: Chunks
    ) -> list:
        """Gradients of :attr:`parameters`: None each in exact mode, where dA is added to the sums now unless ``ds`` is None. ``db`` has run."""
        if not self.adapted:
            return []
        sinks = self.sinks()
        da = None if ds is None else sum_a(x, ds, self.layout, chunks, sink=None if sinks is None else sinks[0], dropout=dropout)
        if sinks is not None:
            return [None] * (2 * len(self.adapted))
        found = []
        for place, (start, width) in enumerate(self.layout.ranges):
            rank = self.layout.ranks[place]
            first = place * self.layout.rank
            found += [da[first : first + rank], db.value[start : start + width, :rank]]
        return found
