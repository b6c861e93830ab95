"""How exact the exact gradient is: room in its integers, and its error beside PEFT's, on a named shape with random weights.

Room: one global batch of uneven documents through the whole model; for each adapter tensor, largest |partial| x chunks as a share of
the 2^23 at which a step is refused, and the share of non-zero partials that became 0 or kept under 10 bits.

Error: x and dY of every adapted linear are captured from the same model and documents; dA and dB of the linear by the library's exact
sums, by PEFT's maths with everything in the working dtype, and by PEFT's default (A, B and the products with them in fp32), each as
its relative L2 distance from float64. A and B hold numbers of the working dtype, so that all are given the same weights.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import struct
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import fastlora
from bench import maths, peers, workload
from bench.provenance import provenance
from bench.shapes import Shape, build, default_dtype
from bench.systems import prepare
from fastlora import blocks, packing, stream
from fastlora.config import SEVEN
from fastlora.data import Row
from fastlora.exact import discard, exact
from fastlora.inject import lora_layers
from fastlora.setup import Objective
from fastlora.token_sum import LIMIT, TokenSum, read_stats
from verify.subject import EXACT, LinearInputs
from verify.subjects import FastloraLinear

FACTORS = ("lora_A", "lora_B")
# Which gradient is whose in the rows of a result; the first is ours.
OURS, HALF, DEFAULT = "exact", "peft_working_dtype", "peft_default"


def room(sums: Sequence[tuple[str, TokenSum]]) -> list[dict]:
    """For each sum: chunks, its bound as a share of the limit, the bits left below it, and the share of underflowed partials."""
    rows = []
    for (name, of), (_, bits, filled, small) in zip(sums, read_stats([s for _, s in sums]), strict=True):
        (peak,) = struct.unpack("<f", struct.pack("<i", bits))
        bound = peak * of.chunks / LIMIT
        rows.append({
            "tensor": name, "largest_partial": peak, "chunks": of.chunks, "share_of_limit": bound,
            "headroom_bits": -math.log2(bound) if bound else None, "underflow_share": small / filled if filled else 0.0,
        })  # fmt: skip
    return rows


def of_model(model: nn.Module, rows: Sequence[Row], alignment: int, tokens: int, device: str) -> list[dict]:
    """:func:`room` of every adapter tensor after one global batch through an injected model, whose layers are fused here."""
    prepare(model)
    objective, ids = Objective(model), packing.sample_ids(rows)
    one = blocks.single_thread() if device == "cpu" else contextlib.nullcontext()
    with one, exact(model):
        for cut in packing.plan(rows, tokens, alignment):
            batch = packing.collate([rows[i] for i in cut], [ids[i] for i in cut], alignment, device, seed=0, step=1)
            with stream.use(batch.stream):
                objective(batch).backward()
    found = room([(f"{layer.path}.{name}", s) for layer in lora_layers(model) for name, s in zip(FACTORS, layer.sums, strict=True)])
    discard(model)
    return found


def capture(model: nn.Module, rows: Sequence[Row], device: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(x [M, K], dY [M, N]) of every one of the seven projections by its path, for the summed loss, a document at a time."""
    seen: dict[str, tuple[list, list]] = {}
    hooks = []

    def watch(path: str, module: nn.Module) -> None:
        inputs, gradients = seen[path] = [], []

        def keep(_, arguments, output) -> None:
            inputs.append(arguments[0].detach()[0])
            output.register_hook(lambda gradient: gradients.append(gradient[0]))

        hooks.append(module.register_forward_hook(keep))

    for path, module in model.named_modules():
        if path.rpartition(".")[2] in SEVEN:
            watch(path, module)
    try:
        for row in rows:
            batch = workload.batch_of([row], device)
            hidden = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=hidden, labels=batch["labels"], num_items_in_batch=1).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (torch.cat(inputs), torch.cat(gradients)) for path, (inputs, gradients) in seen.items()}


def exact_gradients(inputs: LinearInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA, dB) by the library's exact sums."""
    result = FastloraLinear(inputs.x.device.type, (inputs.x.dtype,)).run(inputs, EXACT)
    return result.da, result.db


def plain_gradients(inputs: LinearInputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(dA, dB) of PEFT's maths, the adapter's part in ``dtype``: autograd's own, scale after the second product."""
    a, b = (t.to(dtype, copy=True).requires_grad_() for t in (inputs.a, inputs.b))
    y = maths.lora(inputs.x.to(dtype), inputs.weight.to(dtype), a, b, inputs.alpha / inputs.rank)
    return torch.autograd.grad(y, (a, b), inputs.dy.to(dtype))


def errors(path: str, inputs: LinearInputs) -> list[dict]:
    """Relative L2 errors of dA and dB against float64, a row a tensor."""
    wanted = plain_gradients(inputs, torch.float64)
    gradients = {
        OURS: exact_gradients(inputs), HALF: plain_gradients(inputs, inputs.x.dtype), DEFAULT: plain_gradients(inputs, torch.float32)
    }  # fmt: skip
    return [
        {"tensor": f"{path}.{name}"}
        | {who: float((pair[i].double() - wanted[i]).norm() / wanted[i].norm()) for who, pair in gradients.items()}
        for i, name in enumerate(FACTORS)
    ]


def of_linears(model: nn.Module, rows: Sequence[Row], rank: int, device: str) -> list[dict]:
    """:func:`errors` of every projection of a bare model."""
    draw, found = torch.Generator(device).manual_seed(7), []
    captured = capture(model, rows, device)
    while captured:
        path, (x, dy) = captured.popitem()
        weight = model.get_submodule(path).weight
        # Of the working dtype's numbers: the scales of PEFT's start for A and of peers.random_b for B.
        a, b = (
            (torch.randn(size, generator=draw, device=device) * spread).to(x.dtype).float()
            for size, spread in (((rank, x.shape[1]), x.shape[1] ** -0.5), ((dy.shape[1], rank), 0.1 * rank**-0.5))
        )
        nothing = torch.zeros(len(x), dtype=torch.int64, device=device)
        found += errors(path, LinearInputs(x, weight, a, b, None, dy, float(rank), False, 0.0, nothing, 0))
    return sorted(found, key=lambda row: row["tensor"])


def summary(tensors: Sequence[dict], errors_found: Sequence[dict]) -> dict:
    """Worst and median of everything, and the tensors whose exact gradient is further from float64 than a PEFT gradient."""
    worse = {who: [row["tensor"] for row in errors_found if not row[OURS] <= row[who]] for who in (HALF, DEFAULT)}
    shares = {key: [row[key] for row in tensors] for key in ("share_of_limit", "underflow_share")}
    shares |= {who: [row[who] for row in errors_found] for who in (OURS, HALF, DEFAULT)}
    return {
        "worst": {key: max(values) for key, values in shares.items()},
        "median": {key: statistics.median(values) for key, values in shares.items()}, "worse_than": worse,
    }  # fmt: skip


def lines(result: dict) -> list[str]:
    """What was found, for the terminal."""
    worst, median, tensors = result["summary"]["worst"], result["summary"]["median"], result["tensors"]
    top = max(tensors, key=lambda row: row["share_of_limit"])
    lost = max(tensors, key=lambda row: row["underflow_share"])
    said = [
        f"largest partial x chunks over 2^23, {len(tensors)} tensors: worst {worst['share_of_limit']:.3g} ({top['tensor']}), "
        f"median {median['share_of_limit']:.3g}",
        f"underflowed partials: worst {worst['underflow_share']:.3g} ({lost['tensor']}), median {median['underflow_share']:.3g}",
    ]
    for who, what in ((OURS, "exact sums"), (HALF, f"PEFT in {result['dtype']}"), (DEFAULT, "PEFT, A and B in fp32")):
        said.append(f"error against float64, {what}: worst {worst[who]:.3g}, median {median[who]:.3g}")
    total = len(result["errors"])
    for who, what in ((HALF, f"PEFT's in {result['dtype']}"), (DEFAULT, "that of PEFT with A and B in fp32")):
        worse = result["summary"]["worse_than"][who]
        said.append(f"exact gradient at most {what}: {total - len(worse)} of {total} tensors")
        if worse:
            said.append(f"  not: {'all of them' if len(worse) == total else ', '.join(worse)}")
    return said


def run(shape: Shape, device: str, *, tokens: int = 4096, rank: int = 16, commit: str | None = None,
        say: Callable[[str], None] = print) -> dict:
    """Measure both; a result for :func:`bench.provenance.write_result`."""
    begun, dtype, alignment = time.monotonic(), default_dtype(device), stream.alignment_for(device)
    rows = workload.short_rows("library", tokens, shape.vocabulary, alignment)
    model = build(shape, device, dtype)
    found = of_linears(model, rows, rank, device)
    fastlora.inject(model, fastlora.LoraConfig(r=rank, lora_alpha=rank), seed=0)
    peers.random_b(model, rank, torch.Generator(device).manual_seed(2))
    # Two micro-batches: a global batch is more than one.
    tensors = of_model(model, rows, alignment, max(tokens // 2, max(packing.padded_length(len(r), alignment) for r in rows)), device)
    result = {
        "kind": "exactness", "shape": shape.name, "layers": shape.layers, "tokens": sum(map(len, rows)), "rank": rank,
        "dtype": str(dtype).removeprefix("torch."), "provenance": provenance(commit), "tensors": tensors, "errors": found,
        "summary": summary(tensors, found), "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    for text in lines(result):
        say(text)
    return result
