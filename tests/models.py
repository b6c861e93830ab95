"""Tiny random models of real architectures, made from transformers configurations; nothing is
downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# What keeps a mixture of experts small; for tiny_model.
EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# The expert weights of both, as a field of LoraConfig.
ON_EXPERTS = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, layers: int = 2, **overrides
) -> torch.nn.Module:
    """A causal model with hidden size 32, two layers and 96 tokens, in fp32 and training mode."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 96,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings.update(overrides)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def tokens(rows: int = 2, length: int = 12, vocabulary: int = 96, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(
        3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def raw(tensors) -> dict[str, bytes]:
    """The raw bytes of named tensors, to compare bit for bit."""
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors
    }
