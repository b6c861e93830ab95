"""fastlora inside transformers' own Trainer: ordinary gradients, any optimiser, PEFT's files at the end.

Run it anywhere: ``python examples/transformers_trainer.py [FOLDER]``. The model is a tiny random Llama, so nothing is
downloaded; FOLDER gets the adapter (default: a temporary one).
"""

# ruff: noqa: T201  (a script that shows its result)

from __future__ import annotations

import sys
import tempfile

import torch
import transformers

import fastlora
from fastlora.report import snapshot


def make_model() -> torch.nn.Module:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def main(folder: str) -> None:
    """Train a few steps, show what changed, write the adapter, and read it back into a bare model."""
    model = fastlora.inject(make_model(), fastlora.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05), seed=0)
    start = snapshot(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 96, (16, 24))]
    settings = transformers.TrainingArguments(
        output_dir=folder, max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model=model, args=settings, train_dataset=rows).train()

    for sentence in fastlora.update_report(start, model).findings:
        print(sentence)
    fastlora.save_adapter(model, folder)
    again = fastlora.load_adapter(make_model(), folder)
    print("adapter:", fastlora.digest(model))
    print("read back:", fastlora.digest(again))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as place:
            main(place)
