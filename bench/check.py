"""What is timed has to be right first: short verifications against references, run before the clock.

The LoRA linear goes before ``verify``'s own judge: every element of y, dx, dA and dB within its rounding bound of a float64 oracle,
at the very features, rank, dropout and kind of sums that will be timed. A whole model, and blocks that no oracle knows, are
held against the same maths in a wider dtype: each gradient may be no further from it than twice as far as plain torch in the working
dtype is, with adapters as strong as their base, so that an adapter left out, a wrong scale or a lost mask is far outside.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from torch import nn

import fastlora
from bench import nonexact
from bench.shapes import Shape, build
from bench.systems import Spec, around_batches, prepare
from fastlora import blocks, packing, stream
from fastlora.data import Row, make_row
from fastlora.exact import discard, exact
from fastlora.inject import lora_layers
from fastlora.ops.dropout import module_key
from fastlora.setup import Objective
from verify.bounds import judged_on
from verify.claims.accuracy import OUTPUTS, bounds_of
from verify.judge import judge
from verify.oracle.philox import keep_mask, rate
from verify.subject import EXACT, GRAD, LinearInputs
from verify.subjects import FastloraLinear

SLACK = 2.0
LINEAR_ROWS = 192
# Documents of the whole-model check: over one tile, under one, a single tile's edge.
LENGTHS = (200, 70, 33)
LAYERS, VOCABULARY = 2, 1024


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found. ``reason`` is empty if it passed; ``worst`` is the largest error as a share of what is allowed."""

    reason: str
    worst: float
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether what was checked may be timed."""
        return not self.reason


@functools.lru_cache(maxsize=64)
def linear(inner: int, outer: int, rank: int, dropout: float, exact_sums: bool, device: str, dtype: torch.dtype) -> Verdict:
    """The LoRA linear at given features, by verify's bounds (see verify/claims/accuracy.py)."""
    draw = torch.Generator().manual_seed(inner + outer + rank)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    x, dy = values(LINEAR_ROWS, inner).to(device, dtype), values(LINEAR_ROWS, outer).to(device, dtype)
    inputs = LinearInputs(
        x, (values(outer, inner) / inner**0.5).to(device, dtype), (values(rank, inner) / inner**0.5).to(device),
        (values(outer, rank) / rank**0.5).to(device), None, dy, 2.0 * rank, False, dropout,
        torch.randint(0, 2**62, (LINEAR_ROWS,), generator=draw).to(device), 2**61 + 1,
    )  # fmt: skip
    subject = FastloraLinear(torch.device(device).type, (dtype,))
    mode = EXACT if exact_sums else GRAD
    result = subject.run(inputs, mode)
    # on the device: in a host's memory the float64 copies of a weight take longer than all that is timed
    with judged_on(device):
        bounds = bounds_of(inputs, result, subject.roundings(dtype, mode), 1.0)
        found = [(name, judge(getattr(result, name), getattr(bounds, name))) for name in OUTPUTS]
    name, worst = max(found, key=lambda item: item[1].share)
    return Verdict("" if worst.share <= 1.0 else worst.sentence(name), worst.share)


def compare(ours: dict, eager: dict, reference: dict, dtype: torch.dtype) -> Verdict:
    """Tensors by name: ours may be ``SLACK`` times as far from the reference as plain torch in the working dtype is.

    Distances are L2 norms. The floor of one unit roundoff of the reference's norm covers a plain result that is exact.
    """
    worst, reason = 0.0, ""
    for name, wanted in reference.items():
        wanted = wanted.double()
        floor = float(wanted.norm()) * torch.finfo(dtype).eps / 2
        allowed = SLACK * float((eager[name].double() - wanted).norm()) + floor
        error = float((ours[name].double() - wanted).norm())
        share = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
        if not share <= worst:
            worst = share
            if not share <= 1.0:
                reason = f"{name} is {error:.3g} from the reference (norm {float(wanted.norm()):.3g}), allowed {allowed:.3g}"
    return Verdict(reason, worst)


class PlainLora(nn.Module):
    """PEFT's maths in plain torch around a linear layer, with the library's dropout masks: the reference's adapter."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, working: torch.dtype) -> None:
        super().__init__()
        # The products are given A and B rounded to the working dtype, whatever they are computed in.
        self.a, self.b = (
            nn.Parameter(t.weight.detach().to(working).to(dtype)) for t in (layer.lora_A, layer.lora_B)
        )
        self.path, self.scaling, self.dropout = layer.path, layer.scaling, layer.lora_dropout
        self.register_buffer("weight", layer.weight.detach().to(dtype))
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        dropped = x
        if self.mask is not None:
            dropped = torch.where(self.mask, x * (1.0 / (1.0 - rate(self.dropout))), 0.0)
        low = nn.functional.linear(dropped, self.a) * self.scaling
        return nn.functional.linear(x, self.weight) + nn.functional.linear(low, self.b)


def model(spec: Spec, shape: Shape, device: str, dtype: torch.dtype) -> Verdict:
    """The gradients of a whole fastlora configuration: two layers of the shape's widths, three documents, one stream."""
    alignment = spec.aligned(device)
    small = shape.cut(min(LAYERS, shape.layers), min(VOCABULARY, shape.vocabulary))
    net = build(small, device, dtype)
    config = fastlora.LoraConfig(r=spec.rank, lora_alpha=spec.rank, lora_dropout=spec.dropout)
    fastlora.inject(net, config, seed=3)
    with torch.no_grad():
        draw = torch.Generator(device).manual_seed(4)
        for layer in lora_layers(net):
            b = layer.lora_B.weight
            b.copy_(torch.randn(b.shape, generator=draw, device=device) / spec.rank**0.5)
    rows = _rows(small, nonexact.LENGTHS if nonexact.NAME in spec.flags else LENGTHS)
    batch = _batch(rows, range(len(rows)), alignment, device)
    # Wider than the working dtype: fp32 for 16 bits, float64 for fp32.
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    reference = _plain_gradients(net, batch, wide, dtype)
    eager = _plain_gradients(net, batch, dtype, dtype)
    others = [_batch(rows, [place], alignment, device) for place in range(len(rows))[::-1]]
    ours, notes = _our_gradients(net, spec, batch, others)
    return dataclasses.replace(compare(ours, eager, reference, dtype), notes=tuple(notes))


def _rows(shape: Shape, lengths: Sequence[int]) -> list[Row]:
    draw = torch.Generator().manual_seed(5)
    return [
        make_row(torch.randint(0, shape.vocabulary, (n,), generator=draw).tolist(), [True] * n, line, "text")
        for line, n in enumerate(lengths, 1)
    ]


def _batch(rows: Sequence[Row], places: Iterable[int], alignment: int, device: str) -> packing.MicroBatch:
    ids, places = packing.sample_ids(rows), list(places)
    return packing.collate([rows[i] for i in places], [ids[i] for i in places], alignment, device, seed=6, step=1)


def _plain_gradients(net: nn.Module, batch: packing.MicroBatch, dtype: torch.dtype, working: torch.dtype) -> dict:
    """Gradients of the summed loss by transformers' own forward in ``dtype``, one document at a time."""
    plain = copy.deepcopy(net).to(dtype)
    wrapped = {}
    for layer in list(lora_layers(plain)):
        parent, _, name = layer.path.rpartition(".")
        wrapped[layer.path] = PlainLora(layer, dtype, working)
        setattr(plain.get_submodule(parent), name, wrapped[layer.path])
    keys = batch.stream.token_keys()
    for length, (start, _) in zip(batch.stream.lengths, batch.stream.spans):
        place = slice(start, start + length)
        for path, layer in wrapped.items():
            if layer.dropout:
                seed = module_key(batch.stream.seed, batch.stream.step, path)
                layer.mask = keep_mask(seed, keys[place], layer.a.shape[1], layer.dropout).to(layer.a.device)
        logits = plain(input_ids=batch.input_ids[:, place], use_cache=False).logits[0]
        nn.functional.cross_entropy(
            logits.to(torch.float64 if dtype == torch.float64 else torch.float32), batch.labels[place], reduction="sum"
        ).backward()
    found = {}
    for path, layer in wrapped.items():
        found[f"{path}.lora_A"], found[f"{path}.lora_B"] = layer.a.grad, layer.b.grad
    return found


def _our_gradients(
    net: nn.Module, spec: Spec, batch: packing.MicroBatch, others: Sequence[packing.MicroBatch]
) -> tuple[dict, list[str]]:
    """The same through the library, as the configuration runs it; with exact sums also what another cut gives."""
    if "ckpt" in spec.flags:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    notes = prepare(net, spec)
    objective, floats, around = Objective(net), "float" in spec.flags, around_batches(spec.flags)

    def gradients(batches: Sequence[packing.MicroBatch]) -> dict:
        one = blocks.single_thread() if batch.labels.device.type == "cpu" else contextlib.nullcontext()
        with one, contextlib.nullcontext() if floats else exact(net):
            for each in batches:
                with stream.use(each.stream), around(each.stream):
                    objective(each).backward()
        found = {}
        for layer in lora_layers(net):
            factors = {"lora_A": layer.lora_A.weight, "lora_B": layer.lora_B.weight}
            for place, (name, parameter) in enumerate(factors.items()):
                gradient = parameter.grad if floats else layer.sums[place].gradient(1.0)
                found[f"{layer.path}.{name}"] = gradient.clone()
        if not floats:
            discard(net)
        return found

    ours = gradients([batch])
    if not floats:
        again = gradients(others)
        same = all(torch.equal(value, again[name]) for name, value in ours.items())
        notes.append(f"two cuts of the documents: {'the same bits' if same else 'OTHER BITS'}")
    return ours, notes
