"""On a GPU "auto" really grows, to the same bytes, and the run says so. (Memory that runs out: tests/unit/test_memory.py.)"""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fastlora import memory
from fastlora.config import LoraConfig
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig
from tests.unit.tiny_run import tiny_model, write_rows
from tests.unit.tiny_tokenizer import make_tokenizer

ROWS = 96


def run(folder, name: str, micro_batch_tokens):
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, ROWS)
    out = io.StringIO()
    config = TrainConfig(data=str(data), output=str(folder / name), steps=3, batch_size=ROWS, learning_rate=1e-2,
                         micro_batch_tokens=micro_batch_tokens)
    trainer = Trainer(tiny_model().to("cuda", torch.bfloat16), make_tokenizer(), config, LoraConfig(r=8),
                      console=Console(file=out, width=200))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = trainer.train()
    return result.digest, trainer, out.getvalue(), before, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_auto_grows_and_gives_the_same_bytes(tmp_path, monkeypatch):
    plain, trainer, *_ = run(tmp_path, "fixed", 2048)
    if "equal" not in trainer.exactness:
        pytest.skip(trainer.exactness)
    monkeypatch.setitem(memory.AUTO, "cuda", 2048)
    grown, trainer, printed, *_ = run(tmp_path, "auto", "auto")
    assert "micro-batches: at most" in printed and trainer.limit >= 4096
    assert grown == plain
