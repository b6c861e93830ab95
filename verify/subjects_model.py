"""The user's own model and data under fastlora, for ``--claim splits --model``: two steps, each batch cut as told.

Everything goes through the entry points that the trainer uses: the model and rows from files, one stream a micro-batch,
exact sums, AdamW.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import fastlora
from fastlora import blocks, guards, packing, stream
from fastlora.data import read_rows
from fastlora.digest import adapter_tensors
from fastlora.errors import InputError
from fastlora.exact import discard, lora_modules
from fastlora.invariant import make_invariant
from fastlora.setup import Objective, choose_device, choose_dtype, load_model, load_tokenizer, longest_row
from verify.oracle.digest import md5_of_tensor
from verify.own_model import RATE, SEED, STEPS, ModelRun, Trace, global_batch
from verify.strategies import DTYPES
from verify.subject import BadSubject, Cut


class OwnModel:
    """A model folder and a file of rows, loaded and with a fresh adapter.

    Args:
        folder: the model. data: JSONL as ``fastlora train`` reads it. device: auto, cpu or cuda. batch: sequences of a
            global batch.

    Raises:
        BadSubject: what the trainer would refuse, or fewer rows than a batch.
    """

    def __init__(self, folder: str, data: str, device: str, batch: int) -> None:
        with _refusals():
            self.folder, self.batch = folder, batch
            self.device, _ = choose_device(device)
            self.dtype = choose_dtype("auto", self.device)
            self.dtype_name = {dtype: name for name, dtype in DTYPES.items()}[self.dtype]
            tokenizer = load_tokenizer(folder)
            found = read_rows(data, tokenizer)
            guards.check_rows(found)
            if len(found.rows) < batch:
                raise BadSubject(f"--data: {data!r} has {len(found.rows)} rows; --splits asks for {batch} a batch")
            self.model = load_model(folder, dtype=self.dtype, device=self.device)
            longest = longest_row(self.model, None)
            used = {row.line: row for step in range(STEPS) for row in global_batch(found.rows, batch, step)}
            for row in used.values():
                if longest is not None and len(row) > longest:
                    raise BadSubject(f"--data: line {row.line} has {len(row)} tokens; allowed is at most {longest}")
            guards.check_tokens(self.model, list(used.values()), ())
            fastlora.inject(self.model, fastlora.LoraConfig(), seed=SEED)
            self.invariant = make_invariant(self.model)
        self.rows, self.alignment = found.rows, stream.alignment_for(self.device.type)
        self.objective = Objective(self.model)
        self.model.train()
        self.start = {name: t.clone() for name, t in adapter_tensors(self.model).items()}

    @property
    def not_exact(self) -> list[tuple[str, str]]:
        """(module, reason) of everything for which fastlora claims nothing."""
        return [*self.invariant.not_exact, *self.objective.not_exact()]

    @property
    def targets(self) -> list[str]:
        """Last names of the linears with an adapter, for another library's configuration."""
        return sorted({name.rpartition(".")[2] for name, _ in lora_modules(self.model)})

    def train(self, cut: Cut, *, float_sums: bool = False, trace: tuple[int, Trace] | None = None) -> ModelRun:
        """Two steps from the first adapter, every global batch cut into ``cut``.

        Args:
            float_sums: the control: ordinary gradients.
            trace: a step, counted from 0, and what records the bits of everything in it.
        """
        for name, tensor in adapter_tensors(self.model).items():
            tensor.copy_(self.start[name])
        optimizer, digests, ran = fastlora.AdamW(self.model, RATE), [], []
        around = blocks.single_thread() if self.device.type == "cpu" else contextlib.nullcontext()
        try:
            with around:
                for step in range(STEPS):
                    records = trace[1] if trace and trace[0] == step else None
                    ran.append(self._step(optimizer, cut, step, float_sums, records))
                    digests.append({n: md5_of_tensor(t) for n, t in adapter_tensors(self.model).items()})
        finally:
            discard(self.model)
            optimizer.zero_grad(set_to_none=True)
        return ModelRun(digests, tuple(ran))

    def _step(self, optimizer, cut: Cut, step: int, float_sums: bool, records: Trace | None) -> tuple[int, ...]:
        rows = global_batch(self.rows, self.batch, step)
        ids, ran = packing.sample_ids(rows), []
        counter = self.model.get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: ran.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
        )
        with contextlib.nullcontext() if float_sums else fastlora.exact(self.model):
            for part in cut:
                batch = packing.collate(
                    [rows[i] for i in part], [ids[i] for i in part], self.alignment, self.device, SEED, step
                )
                spans = [(start, start + n) for (start, _), n in zip(batch.stream.spans, batch.stream.lengths)]
                watched = contextlib.nullcontext() if records is None else records.watch(self.model, spans, batch.lines)
                with stream.use(batch.stream), watched:
                    self.objective(batch).backward()
        counter.remove()
        optimizer.step(supervised_tokens=sum(row.supervised for row in rows))
        optimizer.zero_grad(set_to_none=True)
        return tuple(ran)

    def plain(self) -> torch.nn.Module:
        """The model again from its folder, with nothing of fastlora in it; this object's own is given up."""
        self.model = self.objective = self.invariant = None
        return load_model(self.folder, dtype=self.dtype, device=self.device)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise BadSubject(" ".join(str(error).split())) from error
