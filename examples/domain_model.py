"""A domain model: rank 128 with rsLoRA on plain text, LoRA+, and rows that count more than others.

Run it anywhere: ``python examples/domain_model.py [FOLDER]``. FOLDER gets the files (default: a temporary one). A hard domain needs
rank; above 64 the scaling alpha / r shrinks the update as the rank grows, so rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r).
The model is a tiny random one: nothing is downloaded.
"""

# ruff: noqa: T201  (a script that shows its result)

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

from small_chat import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora

TEXTS = [f"Article {i}. The lessee shall keep item {i % 7} in repair at the lessee's own cost." for i in range(32)]


def main(folder: pathlib.Path) -> None:
    """Train on weighted texts, compare the loss before and after, and say what the adapter's scaling is."""
    save_model(folder / "MODEL")
    for name, part in (("train", TEXTS[:24]), ("held-out", TEXTS[24:])):
        # The newest articles count twice.
        rows = [{"text": text, "weight": 2.0 if i % 4 == 0 else 1.0} for i, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    model = AutoModelForCausalLM.from_pretrained(folder / "MODEL", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    lora = fastlora.LoraConfig(r=128, lora_alpha=128, use_rslora=True)
    config = fastlora.TrainConfig(
        data=str(folder / "train.jsonl"), eval_data=str(folder / "held-out.jsonl"), output=str(folder / "run"), epochs=2,
        batch_size=8, learning_rate=5e-4, loraplus_lr_ratio=4.0, lr_scheduler="cosine",
    )  # fmt: skip
    result = fastlora.Trainer(model, tokenizer, config, lora).train()
    print(f"scaling: {lora.scaling_for('q_proj'):.3f} (alpha / sqrt(r))")
    print("held-out loss:", " -> ".join(f"{loss:.4f}" for _, loss, _ in (result.held_out[0], result.held_out[-1])))
    print("adapter:", result.digest)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(pathlib.Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(pathlib.Path(place))
