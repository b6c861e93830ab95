"""What differs between model families: projections, what the head does to its logits, RoPE that
looks at the batch.

One table row a family. Everything else (norms, activations, attention) is transformers' own code,
which is row-wise or handled by fastlora.invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.config import SEVEN

# RoPE kinds of transformers that choose frequencies by the longest position of the batch.
_BATCH_ROPE = {
    "dynamic": "dynamic NTK scaling recomputes the frequencies from the longest position of the "
    "micro-batch",
    "longrope": "longrope chooses short or long frequencies by the longest position of the "
    "micro-batch",
}


@dataclass(frozen=True)
class Layout:
    """Where a decoder layer keeps what the fused layer needs.

    Attributes:
        norms: names of the layer's norms before and after attention, before and after the MLP; None
            where there is none.
        norm_style: where its RMSNorm rounds, see ops/rms_norm.py.
        qkv, gate_up: names of the products of one input.
        window_of_config: the window is the configuration's for every layer, not the attention's own.
    """

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm", None, "post_attention_layernorm", None,
    )
    norm_style: str = "round_first"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    window_of_config: bool = False


_SANDWICH = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Family:
    """One row: ``model_type`` of the configuration and how this family differs from Llama.

    Attributes:
        model_type: as in the model's ``config.json``.
        projections: names of the linear layers of a block; the default targets.
        softcap_field: configuration field of the soft-cap c of the logits, c * tanh(logits / c), or
            None.
        divisor_field: configuration field by which the logits are divided, or None.
        known_head: ``head_of`` knows this family's head.
        layout: of its decoder layers, for fastlora.fuse; None: they are not fused.
        by_token: classes of its mixture of experts (router, experts kept as parameters of three
            dimensions) whose forward takes tensors of one row a token and gives the same.
    """

    model_type: str
    projections: tuple[str, ...] = SEVEN
    softcap_field: str | None = None
    divisor_field: str | None = None
    known_head: bool = True
    layout: Layout | None = None
    by_token: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", layout=Layout()),
        Family("mistral", layout=Layout(window_of_config=True)),
        Family("qwen2", layout=Layout()),
        Family("qwen3", layout=Layout()),
        Family("gemma", layout=Layout(norm_style="offset")),
        Family(
            "gemma2", softcap_field="final_logit_softcapping", layout=Layout(_SANDWICH, "offset")
        ),
        Family(
            "gemma3_text", softcap_field="final_logit_softcapping", layout=Layout(_SANDWICH, "offset")
        ),
        Family(
            "phi3", projections=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            layout=Layout(qkv=("qkv_proj",), gate_up=("gate_up_proj",), window_of_config=True),
        ),
        Family("smollm3", layout=Layout()),
        Family(
            "olmo2",
            layout=Layout((None, "post_attention_layernorm", None, "post_feedforward_layernorm"), "round_last"),
        ),
        Family("granite", divisor_field="logits_scaling", layout=Layout()),
        Family("qwen3_moe", _ATTENTION, by_token=("Qwen3MoeTopKRouter", "Qwen3MoeExperts")),
        Family("mixtral", _ATTENTION, by_token=("MixtralTopKRouter", "MixtralExperts")),
    )
}


class Head(NamedTuple):
    """How a model gets from tokens to logits, for a loss that never holds the logits.

    logits = softcap * tanh(z / softcap) with z = logit_scale * hidden weight^T; without a soft-cap,
    z. With an adapter on the head, ``lora`` is its LoraLinear, of which ``weight`` is the base's: who
    computes logits from ``weight`` adds what ``lora.in_loss`` says.
    """

    decoder: Callable[..., torch.Tensor]
    weight: torch.Tensor
    softcap: float | None
    logit_scale: float
    lora: nn.Module | None = None


class Decoder:
    """Call a causal model's decoder: ``(input_ids [B, T], position_ids [B, T]) -> last hidden state
    [B, T, H]``.

    Further keywords go to the decoder; the key-value cache is off unless asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **keywords: Any
    ) -> torch.Tensor:
        keywords.setdefault("use_cache", False)
        return self.module(
            input_ids=input_ids, position_ids=position_ids, **keywords
        ).last_hidden_state


def family_of(model: nn.Module) -> Family:
    """The table row of the model; for an unknown ``model_type`` a row with the seven projections
    and no head."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return FAMILIES.get(model_type) or Family(str(model_type), known_head=False)


def head_of(model: nn.Module) -> Head | None:
    """``(decoder, lm_head weight [V, H], softcap, logit_scale, lora)`` of a causal model of a known
    family, else None.

    None also where a known family's head has a bias or is no linear layer, or the model is no
    causal model (a classifier): the caller then takes the model's own logits.
    """
    family = family_of(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not family.known_head or not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    softcap = getattr(model.config, family.softcap_field) if family.softcap_field else None
    divisor = getattr(model.config, family.divisor_field) if family.divisor_field else 1.0
    lora = head if hasattr(head, "lora_A") else None
    return Head(Decoder(model.get_decoder()), head.weight, softcap, 1.0 / divisor, lora)


def batch_dependent_rope(model: nn.Module) -> str | None:
    """Why this model's RoPE depends on what else is in the micro-batch, or None when it does not.

    Looks at ``config.rope_parameters`` (one dictionary, or one for each layer type, as Gemma 3
    has).
    """
    parameters = getattr(getattr(model, "config", None), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for kind in kinds:
        reason = _BATCH_ROPE.get(kind.get("rope_type"))
        if reason:
            return f"rope_type {kind['rope_type']!r}: {reason}"
    return None
