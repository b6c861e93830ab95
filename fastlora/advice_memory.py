"""Bytes and seconds of a training step by formula: what a model, a rank and a micro-batch take on a GPU.

    peak = weights + adapter + saved activations + the larger of (head and loss, backward of one layer)

Derived from what the code keeps: ops/decoder_layer.py (saved for the backward, and alive while the gate's backward runs),
ops/projections.py (16-bit copies of A and B, integer sums), ops/linear_cross_entropy.py (a tile of logits), optim.py. Holds where
decoder layers run fused. ``python -m bench.memory`` compares it with torch's own count. Every figure is a whole number of bytes and
every product stays below 2^53, so that docs/advise/advise.js computes the same.
"""

from __future__ import annotations

import dataclasses
import math

HALF = 2  # bytes of bf16 and fp16
SINGLE = 4
LEAST_RANK = 16


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the formulas read of a model.

    Attributes:
        parameters: frozen weights, all of them. layers, hidden, vocabulary, positions: of its configuration.
        groups: (K, (N, ...)) of each product of a decoder layer: query, key and value; output; gate and up; down.
        heads, key_heads, head_dim: of attention.
        head_norms: norms of queries and keys. sandwich: norms after attention and after the MLP too.
        fused: whether its layers run as fused kernels, where the formula for memory holds.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    positions: int
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    heads: int
    key_heads: int
    head_dim: int
    head_norms: bool = False
    sandwich: bool = False
    fused: bool = True

    def as_dict(self) -> dict:
        """JSON values; what docs/advise/advise.js takes."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one micro-batch's forward and backward, by part.

    Attributes:
        weights: frozen weights. adapter: A, B, their 16-bit copies, AdamW's moments, int64 sums of dA and dB.
        saved: activations kept from the forward to the backward. working: the larger of what head and loss take and what the
            backward of one layer takes beside it.
    """

    weights: int
    adapter: int
    saved: int
    working: int

    @property
    def peak(self) -> int:
        """Most bytes allocated at once."""
        return self.weights + self.adapter + self.saved + self.working


def padded(rank: int) -> int:
    """Rank columns as the kernels hold them: a power of two of at least 16."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


def columns(count: int, rank: int) -> int:
    """Columns of S of a product with ``count`` adapters side by side."""
    return padded(count * padded(rank))


def lora_parameters(model: ModelFacts, rank: int) -> int:
    """Elements of A and B on all projections."""
    return model.layers * rank * sum(len(widths) * inner + sum(widths) for inner, widths in model.groups)


def adapter_bytes(model: ModelFacts, rank: int, rules: dict, size: int = HALF) -> int:
    """Masters, moments and sums of all adapters, and the copies that the kernels read: A, and B block-diagonal."""
    copies = sum(columns(len(widths), rank) * (inner + sum(widths)) for inner, widths in model.groups)
    each = rules["bytes_per_parameter"]
    return lora_parameters(model, rank) * sum(each.values()) + model.layers * copies * size


def kept_a_token(model: ModelFacts, rank: int, size: int = HALF) -> int:
    """Bytes a layer keeps for each token besides its input: q, k, v, attention's output, h1, gate and up, S, and fp32 statistics."""
    (_, qkv), (out, _), (_, gate_up), _ = model.groups
    wide = sum(qkv) + out + model.hidden + sum(gate_up)
    wide += sum(columns(len(widths), rank) for _, widths in model.groups)
    narrow = model.heads + 2
    if model.head_norms:
        wide += (model.heads + model.key_heads) * model.head_dim
        narrow += model.heads + model.key_heads
    if model.sandwich:
        wide += 2 * model.hidden
        narrow += 2
    return wide * size + narrow * SINGLE


def memory(model: ModelFacts, rank: int, tokens: int, checkpointing: int, rules: dict, size: int = HALF) -> Memory:
    """What one micro-batch takes.

    Args:
        rank: of every projection's adapter. tokens: padded tokens of the micro-batch, all supervised.
        checkpointing: 0: layers keep their activations; n: every n-th keeps its input alone.
        rules: the table (``fastlora.advise.rules``). size: bytes of a weight and of an activation.
    """
    row = model.hidden * size
    kept = kept_a_token(model, rank, size)
    again = -(-model.layers // checkpointing) if checkpointing else 0
    saved = tokens * (model.layers * row + (model.layers - again) * kept)
    # gate and up's gradient, the gate's product and its gradient, the gradient that came in and the one that goes out
    gate_up, down = sum(model.groups[2][1]), model.groups[3][0]
    layer = tokens * ((gate_up + 2 * down) * size + 2 * row + (kept if checkpointing else 0))
    # a tile of logits, its rows and their gradient; supervised rows and their gradient; the last layer's output, normed and not
    tile = min(rules["head_rows"], tokens)
    head = tile * (model.vocabulary * size + 2 * row) + tokens * 4 * row
    return Memory(model.parameters * size, adapter_bytes(model, rank, rules, size), saved, max(layer, head))


def usable(card: int, rules: dict) -> int:
    """Bytes that tensors may take on a card: without the driver's context and what the allocator's fragments cost."""
    return math.floor((card - rules["context_bytes"]) / rules["reserved_over_peak"])


def epoch_seconds(model: ModelFacts, data: dict, rank: int, checkpointing: int, tflops: float, rules: dict) -> float:
    """Seconds of one pass over the data on a card of that dense 16-bit rate.

    Frozen products forward and dX; the adapter's six skinny products; causal attention, whose backward is 2.5 times its forward
    (Dao 2023, FlashAttention-2); layers that run again. The share of the rate that a step reaches is one figure of the table.
    """
    linear = float(sum(inner * sum(widths) for inner, widths in model.groups) * model.layers)
    attention = 2.0 * float(model.heads * model.head_dim * model.layers) * float(data["squares"])
    forward = 2.0 * linear * float(data["padded"]) + attention
    again = forward / checkpointing if checkpointing else 0.0
    backward = 2.0 * linear * float(data["padded"]) + 2.5 * attention
    head = 4.0 * float(model.vocabulary * model.hidden) * float(data["supervised"])
    adapter = 6.0 * float(lora_parameters(model, rank)) * float(data["padded"])
    return (forward + again + backward + head + adapter) / (tflops * 1e12 * rules["share_of_peak_rate"])
