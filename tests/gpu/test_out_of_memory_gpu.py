"""On a GPU memory really runs out, and "auto" really grows: the same bytes, and the run says so."""

from __future__ import annotations

import gc
import io
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora import memory
from fastlora.config import LoraConfig
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig
from tests.unit.tiny_run import write_rows
from tests.unit.tiny_tokenizer import make_tokenizer

ROWS = 96


@dataclass(frozen=True)
class Ran:
    """What is left of a run: nothing that holds memory. Bytes: allocated before it, and at its peak above that."""

    digest: str
    exactness: str
    limit: int
    printed: str
    before: int
    above: int


def model():
    """Wide enough that the activations of all rows take hundreds of MiB: the allocator hands out segments of up to 20."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def run(folder, name: str, micro_batch_tokens, cap: int | None = None) -> Ran:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, ROWS)
    out = io.StringIO()
    config = TrainConfig(data=str(data), output=str(folder / name), steps=3, batch_size=ROWS, learning_rate=1e-2,
                         micro_batch_tokens=micro_batch_tokens)
    trainer = Trainer(model(), make_tokenizer(), config, LoraConfig(r=8), console=Console(file=out, width=200))
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        if cap is not None:
            torch.cuda.set_per_process_memory_fraction((before + cap) / total)
        result = trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    above = torch.cuda.max_memory_allocated() - before
    return Ran(result.digest, trainer.exactness, trainer.limit, out.getvalue(), before, above)


@pytest.mark.gpu
def test_a_capped_gpu_halves_and_gives_the_same_bytes(tmp_path):
    small = run(tmp_path, "small", 1024)
    if "equal" not in small.exactness:
        pytest.skip(small.exactness)
    large = run(tmp_path, "large", 32768)
    assert large.digest == small.digest and large.above > 2 * small.above
    capped = run(tmp_path, "capped", 32768, cap=(small.above + large.above) // 2)
    assert "out of memory" in capped.printed and capped.limit < 32768
    assert capped.digest == small.digest


@pytest.mark.gpu
def test_auto_grows_and_gives_the_same_bytes(tmp_path, monkeypatch):
    fixed = run(tmp_path, "fixed", 2048)
    if "equal" not in fixed.exactness:
        pytest.skip(fixed.exactness)
    monkeypatch.setitem(memory.AUTO, "cuda", 2048)
    grown = run(tmp_path, "auto", "auto")
    assert "micro-batches: at most" in grown.printed and grown.limit >= 4096
    assert grown.digest == fixed.digest
