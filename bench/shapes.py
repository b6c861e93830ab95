"""Named model shapes, built with random weights on the device: no download, no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fastlora.errors import InputError


@dataclass(frozen=True)
class Shape:
    """A Llama-family model by its sizes."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    rope_theta: float = 500000.0

    def cut(self, layers: int | None = None, vocabulary: int | None = None) -> Shape:
        """The same widths with fewer layers, or a smaller vocabulary.

        Raises:
            InputError: a count below 1 or above the shape's own.
        """
        wanted = {"layers": layers, "vocabulary": vocabulary}
        changes = {name: value for name, value in wanted.items() if value is not None}
        for name, value in changes.items():
            if not 1 <= value <= getattr(self, name):
                raise InputError(f"{name} = {value}: allowed for {self.name} is 1 to {getattr(self, name)}")
        return replace(self, **changes)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
        Shape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, tied=True, rope_theta=100000.0),
        Shape("tiny", 64, 128, 2, 4, 2, 16, 320),
    )
}


def shape_named(name: str, layers: int | None = None) -> Shape:
    """The shape of that name, cut to ``layers``.

    Raises:
        InputError: an unknown name, or more layers than it has.
    """
    if name not in SHAPES:
        raise InputError(f"shape = {name!r}: allowed are {', '.join(SHAPES)}")
    return SHAPES[name].cut(layers)


def build(shape: Shape, device: torch.device | str, dtype: torch.dtype, *, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """A causal model of that shape: transformers' own class and initialisation, frozen, in training mode.

    The same seed, device and dtype give the same weights.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, head_dim=shape.head_dim,
        max_position_embeddings=131072, rope_parameters={"rope_theta": shape.rope_theta, "rope_type": "default"},
        rms_norm_eps=1e-5, tie_word_embeddings=shape.tied, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False).train()


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a GPU (fp16 where it has none), fp32 on a CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
