"""Faults inside fastlora's own functions, so that its trainer and the harness's loop over its pieces both have them.

Only what stands outside the library can catch these. Functions are replaced by their dotted name while the part runs:
this file imports nothing of the library, and a subject of another maker is left alone.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.subject import Subject
from verify.tiny import END

IGNORED = -100


def _under(target: str, fault: Callable) -> Callable:
    """While the part works, ``target`` is ``fault(the real one)``."""

    def wrap(part):
        def under(method):
            def call(*args, **keywords):
                with mock.patch(target, fault(pkgutil.resolve_name(target))):
                    return method(*args, **keywords)

            return call

        methods = {name: under(getattr(part, name)) for name in ("train", "run", "accumulate") if hasattr(part, name)}
        return Wrapped(part, **methods)

    return wrap


def _in_batch(change: Callable) -> Callable:
    """A fault in what becomes of rows: ``change(batch, rows)`` gives the batch that is trained on."""
    return _under("fastlora.packing.collate", lambda real: lambda rows, *args, **kw: change(real(rows, *args, **kw), rows))


def _labelled(batch, labels: torch.Tensor):
    return replace(batch, labels=labels)


def _shifted_twice(batch, rows):
    """Token t is trained to predict token t + 2; a document's last label comes from what is behind it."""
    return _labelled(batch, batch.labels.roll(-1))


def _not_shifted(batch, rows):
    """Token t is trained to predict itself."""
    return _labelled(batch, batch.labels.roll(1))


def _end_is_padding(batch, rows):
    """The end token is taken for padding and not learnt."""
    return _labelled(batch, batch.labels.masked_fill(batch.labels == END, IGNORED))


def _first_masked(batch, rows):
    """The first supervised token of every row is masked with the prompt."""
    labels = batch.labels.clone()
    for start, stop in batch.stream.spans:
        kept = (labels[start:stop] != IGNORED).nonzero()
        labels[start + kept[:1]] = IGNORED
    return _labelled(batch, labels)


def _prompt_learnt(batch, rows):
    """Prompt tokens are in the loss."""
    labels = batch.labels.clone()
    for row, (start, _) in zip(rows, batch.stream.spans):
        labels[start : start + len(row) - 1] = torch.as_tensor(row.input_ids[1:], device=labels.device)
    return _labelled(batch, labels)


def _documents_mixed(batch, rows):
    """The whole stream is one document: attention looks across rows."""
    stream = batch.stream
    return replace(batch, stream=replace(stream, lengths=(stream.total,), sample_ids=stream.sample_ids[:1]))


def _one_mask(real: Callable) -> Callable:
    """The key of a dropout mask leaves the module out, so that all projections of a block share one."""
    return lambda seed, step, path: real(seed, step, "")


def _head_left_out(real: Callable) -> Callable:
    """The loss takes the head's own weight alone; everywhere else the adapter on it counts."""
    return lambda *args, **keywords: None


def _head_tiles_cross(part):
    """The head's partial sums hold rows of several documents: on the torch path, and in the kernels' chunks."""
    tiles = _under("fastlora.ops.head_lora.by_document", lambda real: lambda counts, step: real((sum(counts),), step))
    chunks = _under(
        "fastlora.ops.head_lora.places",
        lambda real: lambda counts, owner, step: real((sum(counts),), torch.zeros_like(owner), step),
    )
    return tiles(chunks(part))


def _fastlora_alone(subject: Subject) -> str:
    return "" if subject.name.startswith("fastlora") else "a fault of fastlora's own functions"


def _fault(name: str, sentence: str, wrap: Callable, modelled_on: str = "", part: str = "trainer", killer: str = "splits"):
    return Mutant(name, sentence, part, killer, wrap, _fastlora_alone, "trainer", modelled_on)


MUTANTS = (
    _fault("labels shifted twice", "token t is trained to predict token t + 2", _in_batch(_shifted_twice),
           "huggingface/transformers#47394"),
    _fault("labels not shifted", "token t is trained to predict itself", _in_batch(_not_shifted)),
    _fault("end token taken for padding", "the end token is not learnt", _in_batch(_end_is_padding), "huggingface/trl#6357"),
    _fault("first response token masked", "the prompt's mask is one too long", _in_batch(_first_masked),
           "tloen/alpaca-lora#306"),
    _fault("prompt tokens learnt", "prompt tokens are in the loss", _in_batch(_prompt_learnt)),
    _fault("rows see each other", "a packed stream counts as one document", _in_batch(_documents_mixed),
           "huggingface/transformers#25452"),
    _fault("adapter on the head left out", "the loss knows the head's own weight alone",
           _under("fastlora.modules.LoraLinear.in_loss", _head_left_out)),
    _fault("the head's sums cross documents", "partial sums of an adapter on the head hold rows of several documents", _head_tiles_cross),
    _fault("one mask shared by projections", "the dropout mask does not depend on the module",
           _under("fastlora.modules.module_key", _one_mask), "axolotl-ai-cloud/axolotl#3732", "linear", "accuracy"),
)  # fmt: skip
