"""A tiny random Llama on disk with a small tokenizer, and rows of very uneven length, for tests of the trainer."""

from __future__ import annotations

import io
import json
import pathlib

import pytest
import torch
from rich.console import Console

from fastlora import cli
from fastlora.config import LoraConfig
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig
from tests.unit.tiny_tokenizer import make_tokenizer

# For tests of what a GPU must do too: on a machine that has one they run twice.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WORDS = ["user", "assistant", "system", "the", "answer", "is", "one", "two", "three", "hello", "world"]


def tiny_model(seed: int = 0, layers: int = 2, tied: bool = True):
    """A random Llama: hidden 64, 4 query heads on 2 key-value heads, feed-forward 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def model_on(device: str):
    """The tiny model as a run on that device has it: fp32 on the CPU, bf16 on a GPU."""
    return tiny_model() if device == "cpu" else tiny_model().to(device, torch.bfloat16)


def save_model(folder: pathlib.Path, **more) -> pathlib.Path:
    """Model and tokenizer as a transformers folder."""
    tiny_model(**more).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: pathlib.Path, count: int = 12, seed: int = 0) -> pathlib.Path:
    """JSONL of prompt and completion, from a few tokens to over 128."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())

    lengths = [40, 2, 90, 30, 60, 110, 8, 75, 50, 4, 100, 1]
    rows = [{"prompt": words(lengths[i % 12]), "completion": " " + words(1 + lengths[(i * 5 + 3) % 12] // 3)}
            for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(folder: pathlib.Path, name: str, *, model=None, lora: dict | None = None, float_sums: bool = False,
          data: pathlib.Path | None = None, stop_after: int | None = None, **settings):
    """One run on CPU into ``folder / name`` (as far as ``stop_after``); returns (TrainResult, trainer, what was printed)."""
    out = io.StringIO()
    if data is None:
        data = folder / "rows.jsonl"
        if not data.exists():
            write_rows(data)
    base = {"steps": 3, "batch_size": 6, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    config = TrainConfig(data=str(data), output=str(folder / name), **(base | settings))
    trainer = Trainer(model if model is not None else tiny_model(), make_tokenizer(), config,
                      LoraConfig(**({"r": 4} | (lora or {}))), console=Console(file=out, width=200),
                      float_sums=float_sums)
    return trainer.train(stop_after), trainer, out.getvalue()


def run_command(capsys, *arguments):
    """(exit code, standard output, standard error) of one command in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err
