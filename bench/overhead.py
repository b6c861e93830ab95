"""``python -m bench overhead``: what the trainer adds to a step: data, logging, fingerprints and checkpoints.

The same model, rows and cut twice: as a bare step (forward, backward, exact sums and optimiser, as the step level times it) and in
the trainer with its defaults, where a step is all that happens between two of its log lines, means over whole intervals between
checkpoints. The bare step is timed twice; the ratio of the two is the control. The time to the first step is from the loaded model to that
step's end: reading the data, injection, the checks before it, and compilation as far as its cache is cold.
"""

from __future__ import annotations

import gc
import json
import pathlib
import statistics
import tempfile
import time

import torch
from rich.console import Console

from bench import systems
from bench.shapes import Shape, build
from bench.timing import control, control_dict, interleaved
from fastlora.config import LoraConfig
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig
from verify.tiny import tokenizer

# Steps that compile, grow the micro-batch and fill caches.
WARM = 10
ROWS = 4


def write_rows(path: pathlib.Path, count: int, length: int, words: int) -> None:
    """JSONL rows of ``length`` tokens, a word a token: one less in words, and the end token that the trainer adds."""
    draw = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(count):
            drawn = torch.randint(2, words, (length - 1,), generator=draw).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in drawn)}) + "\n")


def measure(shape: Shape, device: str, dtype: torch.dtype, *, tokens: int, steps: int, every: int, samples: int | None = None) -> dict:
    """Milliseconds a step of both, their ratio, and the control.

    Args:
        tokens: of a step, as four rows. steps: timed in the trainer. every: steps between two checkpoints. samples: of the bare step.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "rows.jsonl"
        words = min(4096, shape.vocabulary)
        write_rows(data, ROWS * 8, tokens // ROWS, words)
        config = TrainConfig(
            data=str(data), output=f"{folder}/run", steps=WARM + steps, batch_size=ROWS, micro_batch_tokens=tokens,
            checkpoint_every=every, learning_rate=systems.RATE,
        )  # fmt: skip
        model = build(shape, device, dtype)
        begun = time.perf_counter()
        trainer = Trainer(model, tokenizer(words), config, LoraConfig(r=16, lora_alpha=16), console=Console(quiet=True))
        ends = _timed(trainer)
        rows = list(trainer.batch_of(1))
        last = json.loads((pathlib.Path(folder) / "run" / "log.jsonl").read_text().splitlines()[-1])
    del trainer, model
    gc.collect()
    running = systems.adapted(systems.parse("fastlora", tokens=tokens), build(shape, device, dtype), device, rows)
    bare = interleaved({"bare": running.full_step}, device, base="bare", samples=samples)
    each = [(b - a) * 1e3 for a, b in zip(ends[WARM - 1 :], ends[WARM:])]
    in_trainer = statistics.fmean(each)
    return {
        "tokens": running.tokens, "padded_tokens": running.padded, "micro_batches": len(last["micro_batches"]),
        "steps": steps, "checkpoint_every": every,
        "trainer_ms": in_trainer, "trainer_median_ms": statistics.median(each), "trainer_steps_ms": each, "first_step": WARM + 1,
        "seconds_to_first_step": ends[0] - begun,
        "bare": bare["bare"].as_dict(), "trainer_over_bare": in_trainer / bare["bare"].median, "control": control_dict(control(bare, "bare")),
    }  # fmt: skip


def _timed(trainer: Trainer) -> list[float]:
    """Train; when each step ended, everything that is due after it included (a step's loss is read, so the device is done)."""
    ends, advance = [], trainer._advance

    def step() -> None:
        advance()
        ends.append(time.perf_counter())

    trainer._advance = step
    trainer.train()
    return ends
