"""Exact LoRA in a plain PyTorch loop: another order of the micro-batches gives the same adapter, byte for byte.

Run it anywhere: ``python examples/plain_loop.py``. The model is a tiny random Llama, so nothing is downloaded.
"""

# ruff: noqa: T201  (a script that shows its result)

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora

STEPS = 4


def make_model() -> torch.nn.Module:
    """A random Llama with adapters on its seven projections; the same one at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return fastlora.inject(LlamaForCausalLM(config), fastlora.LoraConfig(r=8, lora_alpha=16), seed=0)


def make_batches() -> list[list[torch.Tensor]]:
    """One global batch of sequences [length] a step, of very uneven lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 70, 12, 41, 5, 33, 90, 8)
    return [[torch.randint(3, 96, (n,), generator=generator) for n in lengths] for _ in range(STEPS)]


def backward(model: torch.nn.Module, sequences: list[torch.Tensor]) -> None:
    """One micro-batch a sequence; the loss is the sum over its tokens, never a mean."""
    for ids in sequences:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits.float(), ids[1:], reduction="sum").backward()


def train(*, backwards: bool, exact: bool = True) -> str:
    """Train with the sequences of every batch in one order or in the other; returns the adapter's digest."""
    model = make_model()
    optimizer = fastlora.AdamW(model, lr=1e-2, max_grad_norm=1.0)
    for batch in make_batches():
        supervised = sum(len(ids) - 1 for ids in batch)
        order = batch[::-1] if backwards else batch
        if exact:
            with fastlora.exact(model):  # all micro-batches of one optimiser step
                backward(model, order)
        else:
            backward(model, order)  # ordinary gradients in .grad
        optimizer.step(supervised_tokens=supervised)  # divides once, by the whole batch
        optimizer.zero_grad()
    return fastlora.digest(model)


def main() -> None:
    """Print the digests of both orders, with exact sums and with float sums."""
    print("exact sums, one order:  ", train(backwards=False))
    print("exact sums, the other:  ", train(backwards=True))
    print("float sums, one order:  ", train(backwards=False, exact=False))
    print("float sums, the other:  ", train(backwards=True, exact=False))


if __name__ == "__main__":
    main()
