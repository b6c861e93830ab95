"""``python -m bench.evidence --model DIR``: what the advice stands on, measured on a real model and real text with the library itself.

Two questions, each by short runs on the demo's data (docstrings of Python's standard library; held-out functions of modules that are
not trained on): full fine-tuning, LoRA on all seven projections and LoRA on q and v, each at two learning rates; and rsLoRA against LoRA with the
same alpha, from rank 8 to 256. docs/advice.md's tables are made from the result by ``python -m bench.evidence_page``.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pathlib
import tempfile
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from bench.into import earlier, marked
from bench.provenance import provenance, result_path, write_result
from fastlora import demo_data, packing, setup, stream
from fastlora.config import LoraConfig
from fastlora.data import IGNORED, Row, read_rows
from fastlora.evaluate import Evaluation, evaluate, paired
from fastlora.invariant import make_invariant
from fastlora.train import Trainer
from fastlora.train_config import TrainConfig, learning_rates

SEVEN, QV, FULL = "LoRA on all seven", "LoRA on q and v", "all weights"
RANKS = (8, 16, 32, 64, 128, 256)
# The alpha of both scalings at every rank; LoRA's own default in PEFT is 8, here it is the smaller advised rank.
ALPHA = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run: optimiser steps of the two questions, sequences a step, functions held out, and the learning rates tried."""

    steps: int
    rank_steps: int
    batch: int
    held_out: int
    tokens: int
    rates: dict[str, tuple[float, ...]]
    rank_rate: float
    ranks: tuple[int, ...]


WHOLE = Size(40, 20, 16, 128, 8192, {SEVEN: (3e-4, 1e-3), QV: (1e-3, 3e-3), FULL: (3e-5, 1e-4)}, 3e-4, RANKS)
QUICK = Size(4, 3, 4, 12, 1024, {SEVEN: (1e-3,), QV: (3e-3,), FULL: (1e-4,)}, 3e-4, (8, 256))


class Bench:
    """A model on its device, data to train on and held out, and the runs made of them."""

    def __init__(self, model: str, size: Size, folder: pathlib.Path, device: str = "auto") -> None:
        self.size, self.folder = size, folder
        self.device, _ = setup.choose_device(device)
        self.tokenizer = setup.load_tokenizer(model)
        # On the host, so that a run's peak is its own; transformers reads a GGUF file slowly, so it is read once.
        self.base = setup.load_model(model, dtype=setup.choose_dtype("auto", self.device))
        made = demo_data.write(
            folder / "data", train_rows=size.batch * size.steps, held_out_rows=size.held_out,
            count_tokens=lambda text: len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        )  # fmt: skip
        self.train, self.held_out = str(made.train), str(made.held_out)
        self.runs = 0

    def settings(self, steps: int, rate: float) -> TrainConfig:
        """Of one run, LoRA's or not."""
        self.runs += 1
        return TrainConfig(
            data=self.train, eval_data=self.held_out, output=str(self.folder / f"run-{self.runs}"), steps=steps, learning_rate=rate,
            batch_size=self.size.batch, micro_batch_tokens=self.size.tokens, eval_every=steps, checkpoint_every=0,
            device=self.device.type,
        )  # fmt: skip

    def lora(self, steps: int, rate: float, **lora) -> dict:
        """One LoRA run by the trainer."""
        config = self.settings(steps, rate)

        def run() -> dict:
            model = copy.deepcopy(self.base).to(self.device)
            trainer = Trainer(model, self.tokenizer, config, LoraConfig(**lora), console=Console(quiet=True))
            result = trainer.train()
            norms = [record["grad_norm"] for record in result.log]
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            return _outcome(result.before, result.after, [loss for _, loss in result.losses], norms) | {"trained_parameters": trained}

        return self._measured(run) | {"learning_rate": rate, "steps": steps}

    def full(self, steps: int, rate: float) -> dict:
        """All weights: transformers' model, fp32 masters under bf16 autocast on a GPU, torch's AdamW; the same rows in the same order,
        cut alike, and the held-out loss judged by the same code."""
        config = self.settings(steps, rate)

        def run() -> dict:
            model = cast(copy.deepcopy(self.base), torch.float32).to(self.device).requires_grad_(True)
            found = full_fine_tuning(model, self.tokenizer, config, self._judge)
            return found | {"trained_parameters": sum(p.numel() for p in model.parameters())}

        return self._measured(run) | {"learning_rate": rate, "steps": steps}

    def _judge(self, model: nn.Module, rows: list[Row]) -> Evaluation:
        """Held-out loss of a copy of ``model`` in the base's dtype, by the trainer's own evaluation."""
        alignment = stream.alignment_for(self.device.type)
        frozen = cast(copy.deepcopy(model), self.base.dtype).requires_grad_(False)
        done = make_invariant(frozen)
        try:
            return evaluate(setup.Objective(frozen), rows, packing.plan(rows, self.size.tokens, alignment), alignment, self.device)
        finally:
            done.undo()

    def _measured(self, run) -> dict:
        """What ``run`` returns, its seconds, and on a GPU the most bytes allocated from its beginning to its end."""
        here = self.device.type == "cuda"
        gc.collect()
        before = 0
        if here:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        begun = time.monotonic()
        found = run()
        peak = found.pop("peak_bytes", None) if here else None
        if here and peak is None:
            peak = torch.cuda.max_memory_allocated() - before
        return found | {"seconds": round(time.monotonic() - begun, 1), "peak_bytes": peak}


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype``, in place; transformers' own cast refuses a model that was read from a GGUF file, whose weights are plain."""
    return nn.Module.to(model, dtype)


def _outcome(before: Evaluation, after: Evaluation, losses: list[float], norms: list[float]) -> dict:
    change, error = paired(before, after)
    half = norms[len(norms) // 2 :]
    return {"held_out_before": before.loss, "held_out_after": after.loss, "change": change, "change_standard_error": error,
            "losses": losses, "grad_norms": norms, "grad_norm": sum(half) / len(half)}


def full_fine_tuning(model: nn.Module, tokenizer, config: TrainConfig, judge) -> dict:
    """Train every weight of ``model`` by ``config``; ``judge(model, rows)`` gives the held-out loss, outside the peak."""
    rows, held_out = (read_rows(path, tokenizer).rows for path in (config.data, config.eval_data))
    before = judge(model, held_out)
    on_gpu = (device := next(model.parameters()).device).type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    losses, norms = [], []
    per_epoch = -(-len(rows) // config.batch_size)
    model.train()
    if on_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
    for step, rate in enumerate(learning_rates(config, config.steps)):
        epoch, place = divmod(step, per_epoch)
        order = packing.epoch_order(len(rows), config.seed, epoch)
        batch = [rows[i] for i in order[place * config.batch_size : (place + 1) * config.batch_size]]
        supervised, total = sum(row.supervised for row in batch), 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        for cut in packing.plan(batch, config.micro_batch_tokens, stream.alignment_for(device.type)):
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = _summed_loss(model, [batch[i] for i in cut], device) / supervised
            loss.backward()
            total += float(loss.detach())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    peak = torch.cuda.max_memory_allocated() - held if on_gpu else None
    del optimizer
    return _outcome(before, judge(model, held_out), losses, norms) | {"peak_bytes": peak}


def _summed_loss(model: nn.Module, rows: list[Row], device: torch.device) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens of padded rows; logits of those tokens alone."""
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)] = torch.from_numpy(row.input_ids), torch.from_numpy(row.labels)
    # Padding stands at the right, behind every token that is read: a causal mask alone is enough, and the fast kernels take it.
    hidden = model.get_decoder()(input_ids=ids.to(device), use_cache=False).last_hidden_state
    targets = labels[:, 1:].to(device)
    kept = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][kept])
    return nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum")


def plan_of(size: Size) -> list[dict]:
    """The runs, the ones that answer most first: a time limit cuts at the end."""
    runs = [{"question": "what", "system": name, "rate": rates[i]}
            for i in range(max(map(len, size.rates.values()))) for name, rates in size.rates.items() if i < len(rates)]
    return runs + [{"question": "rank", "system": name, "rank": rank, "rate": size.rank_rate}
                   for rank in size.ranks for name in ("LoRA", "rsLoRA")]


def run_one(bench: Bench, run: dict) -> dict:
    """One run of the plan."""
    steps, rate = bench.size.steps, run["rate"]
    if run["system"] == FULL:
        return bench.full(steps, rate)
    if run["question"] == "rank":
        lora = {"r": run["rank"], "lora_alpha": ALPHA, "use_rslora": run["system"] == "rsLoRA"}
        return bench.lora(bench.size.rank_steps, rate, **lora)
    return bench.lora(steps, rate, r=16, target_modules=["q_proj", "v_proj"] if run["system"] == QV else None)


def main(
    model: Annotated[str, typer.Option(help="Folder of a model.")],
    output: Annotated[str | None, typer.Option(help="Where the JSON goes. [bench/results/<date>-<device>-evidence.json]")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer steps, sequences and ranks: minutes on a CPU.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further run is begun.")] = 480.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    commit: Annotated[str | None, typer.Option(help="Commit to record, for a copy of the tree without git.")] = None,
    into: Annotated[str | None, typer.Option(help="An earlier result of the same model, sizes and device: its runs are kept, only "
                                             "those that it lacks are made.")] = None,
) -> None:
    """Measure what the advice stands on; the result is written after every run."""
    begun, size = time.monotonic(), QUICK if quick else WHOLE
    found = {"kind": "evidence", "quick": quick, "alpha": ALPHA, "rank": 16, "size": dataclasses.asdict(size),
             "provenance": provenance(commit), "rows": []}
    path = pathlib.Path(output) if output else result_path("evidence", found["provenance"])
    with tempfile.TemporaryDirectory(prefix="fastlora-evidence-") as folder:
        bench = Bench(model, size, pathlib.Path(folder), device)
        found |= {"dtype": str(bench.base.dtype).removeprefix("torch."), "model": type(bench.base).__name__,
                  "parameters": sum(p.numel() for p in bench.base.parameters()), "train_rows": size.batch * size.steps}
        done = {_key(row): row for row in (earlier(into, found) if into else [])}
        for run in plan_of(size):
            if _key(run) in done:
                row = marked(done[_key(run)], found["provenance"]["commit"])
            elif time.monotonic() - begun > time_limit:
                row = run | {"not_run": f"the time limit of {time_limit:.0f} s was reached"}
            else:
                row = run | run_one(bench, run)
            found["rows"].append(row)
            found["seconds"] = round(time.monotonic() - begun, 1)
            write_result(path, found)
            typer.echo(line(row))


def _key(run: dict) -> tuple:
    return run["question"], run["system"], run.get("rank"), run["rate"]


def line(row: dict) -> str:
    """One line for the terminal."""
    name = f"{row['system']}{'' if 'rank' not in row else ' r ' + str(row['rank'])}, rate {row['rate']:g}"
    if "not_run" in row:
        return f"{name}: not run, {row['not_run']}"
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**30:.2f} GiB"
    return (f"{name}: held-out loss {row['held_out_before']:.4f} -> {row['held_out_after']:.4f}, gradient norm {row['grad_norm']:.3g}"
            f"{memory}, {row['seconds']} s")


if __name__ == "__main__":
    typer.run(main)
