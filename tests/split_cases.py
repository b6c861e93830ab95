"""24 ways of cutting the same global batches, and the loop that trains through one of them, below the trainer's own sort."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastlora
from fastlora import packing, stream
from fastlora.blocks import single_thread
from fastlora.data import Row, make_row
from fastlora.exact import exact
from fastlora.invariant import make_invariant
from fastlora.setup import Objective

ROWS, STEPS, SEED = 9, 10, 3


@dataclass(frozen=True)
class Split:
    """How each global batch of nine rows is cut: sizes of the micro-batches, in an order of the rows.

    ``checkpoint_every``: which layers run again in the backward (without fused layers, on the CPU: all or none). ``stop``: after that step the adapter and the optimiser's state are
    all that goes on, with ``then`` as the micro-batches' size.
    """

    size: int
    order: str = "file"
    sizes: tuple[int, ...] = ()
    checkpoint_every: int = 0
    stop: int | None = None
    then: int = 0

    def cuts(self, step: int) -> list[list[int]]:
        """Indices of the rows of each micro-batch, all nine once."""
        order = {
            "file": list(range(ROWS)),
            "reversed": list(range(ROWS))[::-1],
            "mixed": [(4 * i + step) % ROWS for i in range(ROWS)],
        }[self.order]
        size = self.then if self.stop is not None and step > self.stop else self.size
        sizes = self.sizes or (size,) * -(-ROWS // size)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [order[end - n : end] for n, end in zip(sizes, ends)]


ALL = (
    *(Split(size, order) for order in ("file", "reversed", "mixed") for size in (1, 2, 3, 5, 8, ROWS)),
    Split(1, checkpoint_every=1),
    Split(3, "mixed", checkpoint_every=2),
    Split(ROWS, checkpoint_every=1),
    Split(2, stop=5, then=5),
    Split(ROWS, "reversed", stop=4, then=1),
    Split(0, "mixed", sizes=(1, 4, 1, 3)),
)
# For further adapters: one row at a time, all at once, uneven with another order, checkpointed, stopped and gone on.
FEW = (ALL[0], ALL[5], ALL[23], ALL[19], ALL[21])


def random_rows(lengths: Sequence[int], vocabulary: int) -> list[Row]:
    """Rows of random tokens, of which the first third is no supervised text."""
    draw = torch.Generator().manual_seed(SEED)
    made = []
    for line, n in enumerate(lengths, 1):
        ids = torch.randint(3, vocabulary, (n,), generator=draw).tolist()
        made.append(make_row(ids, [i >= n // 3 for i in range(n)], line, "text"))
    return made


@dataclass(frozen=True)
class Trained:
    """What a split gave: digest, losses of the steps, shapes of the streams that ran, adapter tensors."""

    digest: str
    losses: tuple[float, ...]
    streams: tuple[tuple[int, ...], ...]
    adapter: dict[str, torch.Tensor]


class Subject:
    """A model with an adapter that is trained again and again from the same start."""

    def __init__(self, model: torch.nn.Module, **lora) -> None:
        self.model = model.requires_grad_(False).train()
        fastlora.inject(self.model, fastlora.LoraConfig(**lora), seed=SEED)
        draw = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.01)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.device = next(self.model.parameters()).device

    def train(self, rows: Sequence[Row], split: Split, *, steps: int = STEPS, exactly: bool = True) -> Trained:
        """Train ``steps`` steps of nine rows each; ``exactly`` False: ordinary gradients, the control."""
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                if p.requires_grad:
                    p.copy_(self.start[n])
        optimizer = self._optimizer()
        every = split.checkpoint_every if self.device.type == "cuda" else min(split.checkpoint_every, 1)
        invariant = make_invariant(self.model, checkpoint_every=every)
        losses, streams = [], []
        try:
            assert invariant.fused is None or not invariant.fused.refused, invariant.fused.line()
            for step in range(1, steps + 1):
                losses.append(self._step(optimizer, rows[(step - 1) * ROWS : step * ROWS], split, step, exactly, streams))
                if step == split.stop:
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = self._optimizer()
                    optimizer.load_state_dict(state)
        finally:
            invariant.undo()
        adapter = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return Trained(fastlora.digest(self.model), tuple(losses), tuple(streams), adapter)

    def _optimizer(self) -> fastlora.AdamW:
        return fastlora.AdamW(self.model, lr=1e-3, weight_decay=0.01, max_grad_norm=1.0)

    def _step(self, optimizer, rows, split: Split, step: int, exactly: bool, streams: list) -> float:
        objective, ids = Objective(self.model), packing.sample_ids(rows)
        alignment = stream.alignment_for(self.device.type)
        alone = single_thread() if self.device.type == "cpu" else contextlib.nullcontext()
        documents, supervised = {}, 0
        with alone, exact(self.model) if exactly else contextlib.nullcontext():
            for cut in split.cuts(step):
                batch = packing.collate([rows[i] for i in cut], [ids[i] for i in cut], alignment, self.device, SEED, step)
                streams.append(batch.stream.lengths)
                with stream.use(batch.stream):
                    loss = objective(batch)
                    loss.backward()
                documents.update(zip(cut, loss.documents))
                supervised += batch.supervised
        total = sum(documents[i].item() for i in range(ROWS))
        optimizer.step(supervised_tokens=supervised)
        optimizer.zero_grad()
        return total / supervised


def check(subject: Subject, rows: Sequence[Row], splits: Sequence[Split], *, steps: int = STEPS) -> Trained:
    """Train through every split and compare; also that the cuts really ran and every tensor moved. Returns the first's."""
    first = None
    for split in splits:
        found = subject.train(rows, split, steps=steps)
        wanted = tuple(tuple(len(rows[(step - 1) * ROWS + i]) for i in cut) for step in range(1, steps + 1) for cut in split.cuts(step))
        assert found.streams == wanted, split
        still = [n for n, p in found.adapter.items() if torch.equal(p, subject.start[n])]
        assert not still, (split, still)
        first = first or found
        parted = [n for n, p in found.adapter.items() if not torch.equal(p, first.adapter[n])]
        assert found.digest == first.digest and found.losses == first.losses, (split, parted[:3])
    return first


def check_control(subject: Subject, rows: Sequence[Row], splits: Sequence[Split], *, steps: int = 2) -> None:
    """Float sums on the same cuts give more than one digest: the comparison above can fail."""
    assert len({subject.train(rows, split, steps=steps, exactly=False).digest for split in splits}) > 1
