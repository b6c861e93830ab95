"""A training step on CPU beside PEFT's: SmolLM2-135M's shape, random weights, fp32, rank 16 on all seven projections.

Two inputs. Sequences that fill their tiles, where both do the same products. And rows as the demo has them, where PEFT
runs in the faster of two ways that users choose between: one sequence at a time, or sorted by length and padded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

import fastlora
from bench import timing
from bench.lengths import DEMO_ROWS
from bench.provenance import provenance, result_path, write_result
from fastlora import blocks, packing, stream
from fastlora.data import Row, make_row
from fastlora.exact import exact
from fastlora.invariant import make_invariant
from fastlora.setup import Objective

SAMPLES = 5
RANK = 16
PADDED_ROWS = 4  # rows of a padded batch
PEFT, OURS = "peft, sorted and padded", "fastlora, exact"


def smollm2(layers: int = 30) -> torch.nn.Module:
    """SmolLM2-135M's shape with random weights, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, head_dim=64, tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).train()


def rows_of(lengths: Sequence[tuple[int, int]], vocabulary: int) -> list[Row]:
    """Random token ids; the last ``supervised`` of each row carry a loss."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for line, (length, supervised) in enumerate(lengths, 1):
        ids = torch.randint(0, vocabulary, (length,), generator=draw).tolist()
        rows.append(make_row(ids, [i >= length - supervised for i in range(length)], line, "text"))
    return rows


def ours(model: torch.nn.Module, rows: Sequence[Row], tokens: int | None) -> Callable[[], None]:
    """One optimiser step by the trainer's own pieces, micro-batches of at most ``tokens``."""
    fastlora.inject(model, fastlora.LoraConfig(r=RANK))
    make_invariant(model)
    objective, optimizer = Objective(model), fastlora.AdamW(model, 1e-4)
    ids, alignment = packing.sample_ids(rows), stream.alignment_for("cpu")
    cuts = packing.plan(rows, tokens, alignment)

    def step() -> None:
        with blocks.single_thread(), exact(model):
            for cut in cuts:
                batch = packing.collate([rows[i] for i in cut], [ids[i] for i in cut], alignment)
                with stream.use(batch.stream):
                    objective(batch).backward()
        optimizer.step(supervised_tokens=sum(row.supervised for row in rows))
        optimizer.zero_grad()

    return step


def peft(model: torch.nn.Module, rows: Sequence[Row], batches: Sequence[Sequence[int]]) -> Callable[[], None]:
    """One optimiser step of PEFT in a plain loop, a padded batch at a time; the mean is right (a sum, divided once)."""
    from peft import LoraConfig, get_peft_model

    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=seven)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    total = sum(row.supervised for row in rows)
    padded = []
    for batch in batches:
        longest = max(len(rows[i]) for i in batch)
        ids, labels = torch.zeros(len(batch), longest, dtype=torch.long), torch.full((len(batch), longest), -100)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, i in enumerate(batch):
            length = len(rows[i])
            ids[place, :length], mask[place, :length] = torch.tensor(rows[i].input_ids), 1
            labels[place, :length] = torch.tensor(rows[i].labels)
        full = bool(mask.all())  # without a mask sdpa takes its causal path
        padded.append((ids, labels, None if full else mask))

    def step() -> None:
        for ids, labels, mask in padded:
            model(input_ids=ids, labels=labels, attention_mask=mask, num_items_in_batch=total).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(path: str | None = None, commit: str | None = None) -> None:
    """Time both inputs, print ratios, write JSON to ``path`` or to bench/results."""
    base = smollm2()
    result: dict = {"kind": "cpu-step", "provenance": provenance(commit), "threads": torch.get_num_threads()}
    vocabulary = base.config.vocab_size
    for name, lengths in (("full tiles, 4 x 256", ((256, 255),) * 4), ("demo rows", DEMO_ROWS)):
        rows = rows_of(lengths, vocabulary)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        sorted_batches = [by_length[i : i + PADDED_ROWS] for i in range(0, len(rows), PADDED_ROWS)]
        calls = {
            PEFT: peft(copy.deepcopy(base), rows, sorted_batches),
            "peft, one at a time": peft(copy.deepcopy(base), rows, [[i] for i in range(len(rows))]),
            OURS: ours(copy.deepcopy(base), rows, 1024),
        }
        taken = timing.interleaved(calls, "cpu", base=PEFT, samples=SAMPLES, warm_up=1)
        supervised = sum(row.supervised for row in rows)
        seconds = {n: [value / 1e3 for value in t.samples] for n, t in taken.items()}
        medians = {n: t.median / 1e3 for n, t in taken.items()}
        fastest = min(v for n, v in medians.items() if n.startswith("peft,") and not n.endswith(timing.AGAIN))
        result[name] = {
            "seconds": seconds, "over_fastest_peft": medians[OURS] / fastest,
            "control": timing.control_dict(timing.control(taken, PEFT)),
            "supervised_tokens_per_second": {n: supervised / v for n, v in medians.items()},
        }  # fmt: skip
        print(f"{name}: fastlora {medians[OURS] / fastest:.3f} x the faster PEFT")
        for which, value in medians.items():
            spread = f"{min(seconds[which]):.2f}-{max(seconds[which]):.2f}"
            print(f"  {which}: {value:.2f} s ({spread}), {supervised / value:.0f} supervised tokens/s", flush=True)
    write_result(path or result_path("step", result["provenance"]), result)
