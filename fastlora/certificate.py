"""What a merge did to the numbers: rounding of every written tensor against its bound, logits before and after.

A merged weight is W + s B A rounded to the dtype it is written in. In 16 bits that rounding can be larger than the
adapter's own contribution, and nobody sees it; the certificate says it tensor by tensor, from the files as they lie on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors import safe_open
from torch import nn

from fastlora import setup
from fastlora.errors import InputError, TrainingError
from fastlora.experts import ExpertLora
from fastlora.modules import LoraLinear

FILE = "merge_certificate.json"
PROBE_TEXT = "The quick brown fox jumps over the lazy dog. One, two, three, four, five."
_ROWS = 1024  # rows of one weight that are looked at together: bounds the float64 copies


@dataclass(frozen=True)
class TensorRounding:
    """One written weight [N, K] against W + s B A in float64.

    Attributes:
        name: the tensor's. dtype: it was written in.
        error: the largest |written - (W + s B A)|. bound: the largest error allowed to any of its elements.
        of_bound: the largest error as a share of that element's own bound; at most 1.
        adapter: the largest |s B A|.
        lost: L2 norm of the rounding error over that of s B A; 0 where s B A is 0.
        unmoved: share of the elements with s B A other than 0 that were written with the very value of W.
    """

    name: str
    dtype: str
    error: float
    bound: float
    of_bound: float
    adapter: float
    lost: float
    unmoved: float


@dataclass(frozen=True)
class LogitChange:
    """The model with the adapter beside its weights, and merged, on one text.

    Attributes:
        text, tokens: the text and how many tokens it has.
        largest: the largest difference of a logit. scale: the largest magnitude of one.
        divergence: mean over tokens of KL(beside || merged) in nats.
        same_choice: share of tokens at which both find the same next token likeliest.
    """

    text: str
    tokens: int
    largest: float
    scale: float
    divergence: float
    same_choice: float


@dataclass(frozen=True)
class Certificate:
    """All that :func:`fastlora.export.merge_to_folder` wrote down about a merge.

    Attributes:
        digests: of the base's tensors, of the adapter's, and of the merged model's (``fastlora.digest`` of a state dict, one
            shared by two modules counted once).
        tensors: one for each adapted layer. logits: on the probe text.
        files: SHA-256 of every weight file by its name.
    """

    digests: dict[str, str]
    tensors: list[TensorRounding]
    logits: LogitChange
    files: dict[str, str]

    def write(self, folder: pathlib.Path) -> None:
        """Write ``merge_certificate.json`` into ``folder``."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def table(self):
        """A ``rich.table.Table``, a row per merged tensor."""
        from rich import box
        from rich.table import Table

        table = Table(title="Rounding of the merge", caption=_CAPTION, caption_justify="left", box=box.SIMPLE_HEAD,
                      padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("tensor", overflow="fold", min_width=18)
        for name in ("error", "bound", "of bound", "adapter", "lost", "unmoved"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.tensors:
            table.add_row(row.name.removesuffix(".weight"), f"{row.error:.1e}", f"{row.bound:.1e}", f"{row.of_bound:.1%}",
                          f"{row.adapter:.1e}", f"{row.lost:.2%}", f"{row.unmoved:.1%}")
        return table

    def lines(self) -> list[str]:
        """What stands under the table: logits, digests, and what would lose less."""
        at, worst = self.logits, max(self.tensors, key=lambda row: row.lost)
        lines = [
            f"logits on {at.tokens} probe tokens: they differ by at most {at.largest:.2e} (the largest is {at.scale:.3g}), "
            f"divergence {at.divergence:.2e} nats, same likeliest token at {at.same_choice:.1%}",
            f"digests: base {self.digests['base']}, adapter {self.digests['adapter']}, merged {self.digests['merged']}",
        ]
        if worst.dtype != "float32":
            lines.append(f"rounding to {worst.dtype} costs up to {worst.lost:.2%} of the adapter's own length ({worst.name}); "
                         "--dtype float32 writes the sum with a 2^-24 rounding instead")
        return lines


_CAPTION = (
    "error: largest distance from W + s B A. bound: the largest that rounding to the written dtype allows. of bound: largest "
    "error over the element's own bound. adapter: largest |s B A|. lost: length of the error over that of s B A. unmoved: share "
    "of elements that the adapter changes and rounding put back."
)


def probe_ids(tokenizer, text: str) -> torch.Tensor:
    """Token ids [1, T] of the probe text.

    Raises:
        InputError: fewer than two tokens.
    """
    from fastlora import encode

    ids = encode.prompt_ids(tokenizer, text)
    if len(ids) < 2:
        raise InputError(f"probe_text = {text!r}: it has {len(ids)} tokens; allowed is a text of at least 2")
    return torch.tensor([ids])


@torch.no_grad()
def probe_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [T, V] on ``ids`` [1, T] in evaluation mode, in float64 on the CPU."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        return model(input_ids=ids.to(device), use_cache=False).logits[0].double().cpu()
    finally:
        model.train(training)


def logit_change(text: str, beside: torch.Tensor, merged: torch.Tensor) -> LogitChange:
    """Compare two sets of logits [T, V] of one text."""
    ours, theirs = beside.log_softmax(-1), merged.log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    return LogitChange(
        text, len(beside), float((beside - merged).abs().max()), float(beside.abs().max()), max(0.0, float(divergence)),
        float((beside.argmax(-1) == merged.argmax(-1)).double().mean()),
    )


def tensor_roundings(layers: Sequence[LoraLinear | ExpertLora], folder: pathlib.Path) -> list[TensorRounding]:
    """Compare the weights written to ``folder`` with W + s B A of merged ``layers`` that kept their base.

    Raises:
        TrainingError: a tensor is absent from the files, or an element is off by more than its bound.
    """
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    renamed = any(isinstance(layer, ExpertLora) and layer.weight_name not in where for layer in layers)
    read = _as_read(folder) if renamed else {}
    found = []
    for layer in layers:
        name = layer.weight_name
        if name in where:
            with safe_open(where[name], framework="pt") as opened:
                row = _rounding(layer, name, opened.get_slice(name))
        elif name in read:
            row = _rounding(layer, name, read[name])
        else:
            raise TrainingError(f"merge: {name} is not among the written tensors; nothing was kept")
        if not row.of_bound <= 1:
            raise TrainingError(f"merge: {name} was written {row.error:.3g} from W + s B A, where rounding to {row.dtype} "
                                f"allows {row.bound:.3g}; nothing was kept")
        found.append(row)
    return found


def _as_read(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """The folder's tensors by the model's own names: some families store their experts apart, and transformers joins them."""
    import transformers

    with setup.quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).state_dict()


@torch.no_grad()
def _rounding(layer: LoraLinear | ExpertLora, name: str, written) -> TensorRounding:
    """One tensor; ``written`` is a slice of an open safetensors file, or a tensor."""
    s = layer.scaling
    worst = {"error": 0.0, "bound": 0.0, "of_bound": 0.0, "adapter": 0.0}
    squares, moved, unmoved, dtype = [0.0, 0.0], 0, 0, None
    for got, base, a, b in _blocks(layer, written):
        dtype = got.dtype
        delta = s * (b @ a)
        exact = base.double() + delta
        # The float64 product, its scaling and the sum, here and in the merge: r + 2 roundings each.
        wide = 2 * (layer.rank + 2) * 2.0**-53 * (base.double().abs() + abs(s) * (b.abs() @ a.abs()))
        bound = exact.abs() * _relative(dtype) + _half_subnormal(dtype) + wide
        error = (got.double() - exact).abs()
        for key, value in (("error", error), ("bound", bound), ("of_bound", error / bound), ("adapter", delta.abs())):
            worst[key] = max(worst[key], float(value.max()))
        squares[0] += float(error.square().sum())
        squares[1] += float(delta.square().sum())
        moved += int(delta.count_nonzero())
        unmoved += int(((delta != 0) & (got.double() == base.double())).sum())
    lost = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    return TensorRounding(name, str(dtype).removeprefix("torch."), **worst, lost=lost, unmoved=unmoved / moved if moved else 0.0)


def _blocks(layer: LoraLinear | ExpertLora, written) -> Iterator[tuple[torch.Tensor, ...]]:
    """(written, base) [rows, K] and A, B in float64, a block of rows of one product after the other, on the CPU."""
    for index, (base, a, b) in enumerate(layer.products(layer.kept_base)):
        of_product, a = written[index] if layer.kept_base.dim() == 3 else written, a.double().cpu()
        for start in range(0, base.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, base.shape[0]))
            yield of_product[rows], base[rows].cpu(), a, b[rows].double().cpu()


def _relative(dtype: torch.dtype) -> float:
    """The relative error of rounding a float64 to ``dtype``; to 16 bits by way of fp32, as torch casts."""
    unit = torch.finfo(dtype).eps / 2
    return unit if dtype == torch.float32 else unit + 2.0**-24 * (1 + unit)


def _half_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2


def file_hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every weight file in ``folder`` by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
