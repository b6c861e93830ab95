"""Tiny models of every fused family, and documents to run through their decoders."""

from __future__ import annotations

import torch

from fastlora import LoraConfig, inject, stream
from fastlora.ops import backend
from tests.models import tiny_model

LENGTHS = (40, 70, 5)
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 40},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 40},
    "phi3": {"partial_rotary_factor": 0.5, "head_dim": 8},
    "smollm3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
}


def build(family: str, dropout: float = 0.0, layers: int = 1, **lora) -> torch.nn.Module:
    """A tiny model with adapters whose B is not zero, and norms whose weights differ."""
    model = tiny_model(family, layers=layers, max_position_embeddings=256, **FAMILIES[family]).requires_grad_(False)
    inject(model, LoraConfig(**{"r": 3, "lora_dropout": dropout, **lora}), seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
        elif "norm" in name:  # else all alike, and a weight at the wrong feature would not show
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def batch(indices, width: int) -> tuple[stream.Stream, torch.Tensor, torch.Tensor]:
    """(stream, hidden states, their gradient) of some of the documents, each the same wherever it stands."""
    made = stream.Stream(tuple(LENGTHS[i] for i in indices), 128, tuple(indices), seed=3, step=5)
    x, dy = torch.zeros(1, made.total, width), torch.zeros(1, made.total, width)
    for (start, _), i in zip(made.spans, indices):
        draw, n = torch.Generator().manual_seed(i), LENGTHS[i]
        x[0, start : start + n] = torch.randn(n, width, generator=draw)
        dy[0, start : start + n] = torch.randn(n, width, generator=draw)
    return made, x, dy


def run(model, indices, forced: str):
    """Output and input gradient of the decoder over some documents; gradients stay where the mode puts them."""
    made, x, dy = batch(indices, model.config.hidden_size)
    like = next(model.parameters())
    x, dy = x.to(like.device, like.dtype).requires_grad_(), dy.to(like.device, like.dtype)
    with stream.use(made), backend.use(forced):
        y = model.get_decoder()(inputs_embeds=x, position_ids=made.positions(x.device)[None], use_cache=False).last_hidden_state
        y.backward(dy)
    return y.detach(), x.grad


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
