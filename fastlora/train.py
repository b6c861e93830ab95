"""The training loop, from top to bottom.

A global batch of sequences is cut into micro-batches; each is one forward over one stream of tokens; the
gradients of all of them go into exact integer sums; one AdamW step divides once by the supervised tokens.
How the batch is cut therefore cannot change a byte of the adapter, and the loop may cut as memory allows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from math import fsum

from torch import nn

from fastlora import blocks, checkpoint, guards, lock, packing, rundata, rundir, stream
from fastlora.config import LoraConfig
from fastlora.coverage import coverage, coverage_lines
from fastlora.data import Row
from fastlora.digest import Fingerprint, adapter_tensors, digest
from fastlora.due import Due
from fastlora.errors import InputError, TrainingError
from fastlora.evaluate import Evaluation, best_point, evaluate, out_of_patience
from fastlora.exact import discard, exact
from fastlora.inject import inject, injection
from fastlora.interrupt import Interrupt
from fastlora.invariant import make_invariant
from fastlora.log import Progress, RunLog, TensorBoard, make_console, memory_in_use, require_tensorboard
from fastlora.memory import Budget
from fastlora.optim import AdamW, StepReport
from fastlora.plot import warmed_up
from fastlora.report import snapshot
from fastlora.runreport import TrainResult, draw, finish, slim
from fastlora.saving import Saver
from fastlora.selfcheck import exactness_line
from fastlora.setup import Objective, device_line, longest_row
from fastlora.train_config import TrainConfig, learning_rates, total_steps


class Trainer:
    """Trains the LoRA adapter of ``model`` and writes the output folder.

    Args:
        model: a transformers causal language model on its device; gets adapters by ``lora`` if it has none.
        tokenizer: its tokenizer. config: the run's settings. lora: default ``LoraConfig()``.
        console: a ``rich.console.Console``; default standard output. Quiet with ``Console(quiet=True)``.
        float_sums: control experiment: ordinary fp32 gradients instead of exact sums; the result then
            depends on the cut.
        stored: tables of the ``run.toml`` that is repeated: what differs from it is said before the first step.

    Raises:
        InputError: anything found wrong before the first step; nothing has been written then.
    """

    def __init__(self, model: nn.Module, tokenizer, config: TrainConfig, lora: LoraConfig | None = None, *,
                 console=None, float_sums: bool = False, stored: dict | None = None) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.console = make_console() if console is None else console
        self.float_sums, self.stored = float_sums, stored or {}
        if injection(model) is None:
            inject(model, lora or LoraConfig(), seed=config.seed)
        elif lora is not None:
            raise InputError("lora: the model has adapters already; leave lora out, or eject(model) first")
        self.device = next(model.parameters()).device
        self.alignment = stream.alignment_for(self.device.type)
        self.done = 0
        self.losses: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float, float]] = []
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    def train(self, stop_after: int | None = None) -> TrainResult:
        """Run all steps (or those left), write the files, and return what came out.

        Args:
            stop_after: end as an interrupt would once this many steps are done; ``resume`` goes on from there.

        Raises:
            InputError: bad input; nothing was written.
            TrainingError: the run had to stop; the last good adapter and checkpoint stand on disk.
        """
        with contextlib.ExitStack() as stack:
            rundir.check(self.config)
            if self.config.tensorboard:
                require_tensorboard()
            self.prepare(stack)
            left = stack.enter_context(lock.held(self.config.folder))
            if left:
                self._say(left)
            self._resume()
            self._open(stack)
            self.saver = Saver(self.model)
            stack.callback(self.saver.close)
            stack.enter_context(warmed_up())
            with Interrupt() as stop, Progress(self.console, self.total, self.done) as self.progress:
                if self.evaluation_rows and self.before is None:
                    self._evaluate()
                last = self.total if stop_after is None else min(stop_after, self.total)
                while self.done < last and stop.signal is None and not self.ended_early():
                    self._advance()
            self.saver.save(self)
            draw(self)
            self.saver.wait()
            result = finish(self, stop.signal)
        return result

    # Before the first step -----------------------------------------------------------------------------

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Everything that can be refused but the output folder; what is undone when ``stack`` closes. Writes nothing."""
        config, model, say = self.config, self.model, self._say
        guards.check_causal(model)
        self.data, self.evaluation_data = rundata.read(
            config, self.tokenizer, longest_row(model, config.max_length), self.console)
        self.rows: Sequence[Row] = self.data.rows
        self.evaluation_rows: Sequence[Row] = self.evaluation_data.rows if self.evaluation_data else ()
        guards.check_rows(self.data)
        guards.check_tokens(model, self.rows, self.evaluation_rows)
        note = guards.vocabulary_note(model, self.tokenizer, self.rows, self.evaluation_rows)
        guards.check_update_size(model, config.learning_rate)
        self.total = total_steps(config, len(self.rows))
        self.rates = learning_rates(config, self.total)
        self.batches = packing.Batches(len(self.rows), config.batch_size, config.seed, config.shuffle)
        self.due = Due(config, self.total)
        self.budget = Budget(config, self.device, (self.rows, self.evaluation_rows), self.alignment, say)
        say(f"batch: {config.batch_size} sequences per optimiser step, {self.total} steps; cut into "
            f"micro-batches of at most {self.limit} padded tokens, which does not change the result")
        for line in (*rundata.lines(self.data, self.evaluation_data, self.alignment), *filter(None, [note, rundata.few_steps(config, self.total)])):
            say(line)
        coverage(model, strict=config.strict)
        for line in coverage_lines(model):
            say(f"coverage: {line}")
        say(device_line(model, self.device))

        invariant = make_invariant(model, checkpoint_every=config.activation_checkpointing)
        stack.callback(invariant.undo)
        if invariant.fused:
            say(f"layers: {invariant.fused.line()}")
        if config.activation_checkpointing:
            say(f"activations: 1 of {config.activation_checkpointing} layers runs again in the backward, same bytes")
        model.train()
        self.objective = Objective(
            model, config.label_smoothing, config.z_loss, gradient_scale=config.gradient_scale)
        first = self.batch_of(1)
        ids = packing.sample_ids(first)
        guards.check_batch(packing.collate(first, ids, self.alignment))
        with self.one_thread():
            guards.check_reached(self.objective, first, self.alignment, self.device)
            not_exact = [*invariant.not_exact, *self.objective.not_exact()]
            self.exactness = exactness_line(self, first, ids, not_exact)
        self.budget.auto = self.budget.auto and not (not_exact or self.float_sums)
        say(self.exactness)
        self.start, self.fingerprint = snapshot(model), Fingerprint(adapter_tensors(model))
        self.optimizer = AdamW(
            model, config.learning_rate, weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm or None, gradient_scale=config.gradient_scale,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
        )
        self.identity = rundir.identity(self)
        for line in rundir.repeated(self.stored, self.identity):
            say(line)

    def _resume(self) -> None:
        """Under ``resume`` the last checkpoint."""
        self.checkpoints = self.config.folder / rundir.CHECKPOINTS
        found = checkpoint.latest(self.checkpoints) if self.config.resume else None
        if found is None:
            if self.config.resume:
                self._say("resume: no checkpoint yet, beginning with step 1")
            return
        checkpoint.check_identity(found.identity, self.identity)
        checkpoint.restore(found, self.model, self.optimizer)
        self.done = found.step
        self.held_out = [tuple(point) for point in found.extra["held_out"]]
        self.optimizer.restore_underflow_counts(found.extra.get("underflow", {}))
        if found.extra["before"]:
            self.before = Evaluation(*map(tuple, found.extra["before"]))
            self.after = Evaluation(*map(tuple, found.extra["after"]))
        for note in (*found.notes, f"resume: after step {self.done} of {self.total}"):
            self._say(note)
        changed = rundir.changed_versions(found.extra["versions"])
        if changed:
            self._say(f"resume: {changed}")

    def _open(self, stack: contextlib.ExitStack) -> None:
        """The first files."""
        self.folder = rundir.open_folder(self.config)
        lora = injection(self.model).config.to_peft()
        rundir.write_run(self.folder, {
            "train": self.config.to_repeat(), "lora": lora,
            "data": {"format": self.data.format, "shape": self.data.shape, **self.data.counts},
            "versions": rundir.versions(), "made_of": rundir.made_of(self.identity),
        })
        self.log = RunLog(self.folder / rundir.LOG)
        self.records = [slim(record) for record in self.log.keep(self.done)]
        self.losses = [(record["step"], record["loss"]) for record in self.records]
        self.board = TensorBoard(self.folder / rundir.BOARD) if self.config.tensorboard else None
        if self.board:
            stack.callback(self.board.close)

    # One step ------------------------------------------------------------------------------------------

    def batch_of(self, step: int) -> list[Row]:
        """The rows of a step's global batch, counted from 1 (see :class:`packing.Batches`)."""
        return [self.rows[i] for i in self.batches.of(step)]

    def sums(self, rows: Sequence[Row], ids: Sequence[int], cuts: list[list[int]], step: int) -> list[guards.Ran]:
        """Forward and backward of a global batch, cut into ``cuts``; the gradients' sums stay pending. Waits for no device."""
        ran = []
        with contextlib.nullcontext() if self.float_sums else exact(self.model):
            for cut in cuts:
                batch = packing.collate([rows[i] for i in cut], [ids[i] for i in cut], self.alignment,
                                        self.device, self.config.seed, step)
                with stream.use(batch.stream):
                    loss = self.objective(batch)
                    loss.backward()
                ran.append(guards.Ran(cut, batch, loss.documents))
        return ran

    def compute(self) -> tuple[list[float], list[dict], StepReport]:
        """The next optimiser step, in memory alone.

        Returns:
            The loss of each row, what the log says of each micro-batch, and what the optimiser says.
        """
        step = self.done + 1
        rows = self.batch_of(step)
        ids = packing.sample_ids(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[step - 1] * group["lr_ratio"]
        with self.one_thread():
            ran = self.in_memory(rows, lambda cuts: self.sums(rows, ids, cuts, step))
            losses, update = self._update(rows, ran, step)
        self.done = step
        self.budget.grow(rows)
        return losses, [batch.as_logged() for _, batch, _ in ran], update

    def _advance(self) -> None:
        """One optimiser step, its log line, and what is due after it."""
        config, started = self.config, time.perf_counter()
        self.saver.check()
        try:
            losses, micro_batches, update = self.compute()
        except TrainingError:
            # The parameters are those of the step before: what stopped this one, they are kept.
            if self.done and guards.adapter_is_finite(self.model):
                self.saver.save(self)
            raise
        step = self.done
        names = ("tokens", "padded_tokens", "supervised_tokens")
        tokens, padded, supervised = (sum(m[name] for m in micro_batches) for name in names)
        loss = fsum(losses) / packing.supervised_weight(self.batch_of(step))
        self.losses.append((step, loss))
        seconds = time.perf_counter() - started
        record = {
            "step": step, "epoch": self.batches.epoch(step), "loss": loss,
            "learning_rate": self.rates[step - 1], "grad_norm": update.grad_norm, "clipped": update.clipped,
            "supervised_tokens": supervised, "tokens": tokens, "padded_tokens": padded,
            "tokens_per_second": tokens / seconds, "seconds": seconds, "micro_batches": micro_batches,
        }
        record["fingerprint"], record["codes"] = self.fingerprint.and_codes()
        memory = memory_in_use(self.device)
        self.progress.step(step, loss, self.rates[step - 1], tokens, padded, memory)
        due = self.due.checkpoint(step)
        if self.evaluation_rows and self.due.evaluation(step):
            self._evaluate()
            record["eval_loss"] = self.held_out[-1][1]
            due = due or (best_point(self.held_out)[0] == step < self.total)
        self.saver.logged()
        if due:
            self.saver.save(self, record=record)
        else:
            if step == self.total or (config.digest_every and step % config.digest_every == 0):
                record["digest"] = digest(self.model)
            self.log.append(record)
        self.records.append(slim(record))
        if self.board:
            self.board.step(record)
        self.due.picture(lambda: draw(self))

    def _update(self, rows: Sequence[Row], ran: Sequence[guards.Ran], step: int) -> tuple[list[float], StepReport]:
        losses: list[float] = []
        try:
            report = self.optimizer.step(
                supervised_tokens=packing.supervised_weight(rows),
                before_update=lambda: losses.extend(guards.losses_of(self.objective, ran, step)),
            )
            return losses, report
        except TrainingError as error:
            if not losses:
                raise
            blame = guards.blame_gradient(self.objective, rows, self.alignment, self.device,
                                          self.config.seed, step)
            raise TrainingError(f"step {step}: {blame or error}; no parameter was changed") from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    @property
    def limit(self) -> int:
        """Most padded tokens of a micro-batch."""
        return self.budget.limit

    def in_memory(self, rows: Sequence[Row], run):
        """``run(cuts)``, repeated with smaller micro-batches as often as memory runs out (see :class:`Budget`)."""
        def clear() -> None:  # before there is an optimiser, too
            discard(self.model)
            self.model.zero_grad(set_to_none=True)

        return self.budget.run(rows, run, clear, f"at step {self.done + 1}")

    # Between steps -------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        found = self.in_memory(self.evaluation_rows, lambda cuts: evaluate(
            self.objective, self.evaluation_rows, cuts, self.alignment, self.device))
        self.held_out.append((self.done, found.loss, found.standard_error))
        self.before, self.after = self.before or found, found
        self.progress.restart_clock()
        self._say(f"held-out loss after step {self.done}: {found.loss:.4f} ± {found.standard_error:.4f}")

    def ended_early(self) -> bool:
        """Whether held-out loss has had no new low for as long as ``early_stopping_patience`` allows."""
        return out_of_patience(self.held_out, self.config.early_stopping_patience)

    def one_thread(self):
        """Around whatever must not depend on the number of CPU threads."""
        return blocks.single_thread() if self.device.type == "cpu" else contextlib.nullcontext()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)
