"""On a GPU memory really runs out, and "auto" really grows: the same bytes, and the run says so."""

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
def test_a_capped_gpu_halves_and_gives_the_same_bytes(tmp_path):
    plain, trainer, _, _, small = run(tmp_path, "small", 1024)
    if "equal" not in trainer.exactness:
        pytest.skip(trainer.exactness)
    whole, _, _, before, large = run(tmp_path, "large", 32768)
    assert whole == plain and large > 1.2 * small
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        # nearer to the large run: the allocator hands out whole segments of 2 and 20 MiB
        torch.cuda.set_per_process_memory_fraction((before + small + 0.8 * (large - small)) / total)
        capped, trainer, printed, *_ = run(tmp_path, "capped", 32768)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in printed and trainer.limit < 32768
    assert capped == plain


@pytest.mark.gpu
def test_auto_grows_and_gives_the_same_bytes(tmp_path, monkeypatch):
    plain, trainer, *_ = run(tmp_path, "fixed", 2048)
    if "equal" not in trainer.exactness:
        pytest.skip(trainer.exactness)
    monkeypatch.setitem(memory.AUTO, "cuda", 2048)
    grown, trainer, printed, *_ = run(tmp_path, "auto", "auto")
    assert "micro-batches: at most" in printed and trainer.limit >= 4096
    assert grown == plain
