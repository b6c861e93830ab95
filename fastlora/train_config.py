"""What a training run is made of: one frozen dataclass, every field checked with an error naming it."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib

from fastlora.errors import InputError

SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEVICES = ("auto", "cuda", "cpu")
DEFAULT_BATCH = 16
# What one command decides for itself and no file may: whether a folder's run is gone on with or replaced.
OF_THE_COMMAND = ("resume", "overwrite")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of one run (LoRA's own stand in :class:`fastlora.LoraConfig`).

    Attributes:
        data: JSONL, JSON or Parquet file to train on, a folder or a glob of them. ``eval_data``: the same, never trained
            on, or None. ``token_cache``: folder for the tokens of large data; None: ``fastlora-tokens`` beside ``output``.
        output: folder for the adapter, the log, the report and the checkpoints.
        model: folder of the base model (or a hub name); None when a model object is given to the Trainer.
        gguf_file: name of the GGUF file inside the model's folder, if the weights are stored so.
        batch_size: *sequences per optimiser step*. May be given instead as ``micro_batch_size`` times
            ``gradient_accumulation_steps``; the product is the batch. How a batch is cut is decided by
            ``micro_batch_tokens`` alone and does not change the result.
        micro_batch_tokens: most padded tokens in one forward, or "auto".
        max_length: longest row in tokens; None means what the model allows.
        steps: optimiser steps; None means ``epochs`` passes over the data (a fraction is allowed).
        learning_rate: peak rate. ``warmup_ratio``: share of the steps that warm up; none has rate 0.
        loraplus_lr_ratio: LoRA+: the rate of B over that of A; ``learning_rate`` is A's.
        lr_scheduler_kwargs: further settings of the schedule by transformers' names, such as ``{"min_lr_rate": 0.1}``.
        max_grad_norm: clip norm of the exact gradient of the mean loss; 0 or None turns it off.
        gradient_scale: a static power of two applied to the loss and taken out again by the optimiser;
            raises small partial sums above the fixed point's low end.
        label_smoothing: e: the loss of a token is (1 - e) of its -log p and e of the mean of -log p over the
            vocabulary. ``z_loss``: k: every supervised token adds k (log sum exp of its logits)^2. Training only:
            the held-out loss stays the plain cross-entropy.
        shuffle: a permutation by (seed, epoch); False keeps the file's order.
        on_bad_row: "refuse" or "skip". ``on_long_row``: "refuse", "skip" or "truncate".
        device, dtype: "auto" picks CUDA if there, and bf16 on CUDA (fp16 without it), fp32 on CPU.
        resume: go on from the last checkpoint in ``output``. ``overwrite``: replace the run there.
        checkpoint_every: steps between checkpoints (0: only at the end), of which the newest
            ``keep_checkpoints`` stay.
        checkpoint_minutes: minutes between checkpoints, beside ``checkpoint_every``; 0: by steps alone. The checkpoint with
            the lowest held-out loss stays too.
        early_stopping_patience: held-out evaluations without a new lowest loss after which the run ends; 0: never.
        eval_every: steps between held-out evaluations; 0 means about four times in a run.
        digest_every: steps between full MD5 digests in the log; 0 means at checkpoints only.
        save_dtype: dtype of the adapter file; float32 keeps the masters.
        activation_checkpointing: 0: every layer keeps its activations; n: every n-th keeps its input alone and
            runs again in the backward: less memory, more time, the same bytes. Above 1 where all layers are fused.

    Raises:
        InputError: a field is out of range; the message names the field, its value and what is allowed.
    """

    data: str
    output: str
    model: str | None = None
    gguf_file: str | None = None
    eval_data: str | None = None
    token_cache: str | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    micro_batch_tokens: int | str = "auto"
    max_length: int | None = None
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 2e-4
    lr_scheduler: str = "linear"
    lr_scheduler_kwargs: dict = dataclasses.field(default_factory=dict)
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    loraplus_lr_ratio: float = 1.0
    max_grad_norm: float | None = 1.0
    gradient_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0
    shuffle: bool = True
    on_bad_row: str = "refuse"
    on_long_row: str = "refuse"
    device: str = "auto"
    dtype: str = "auto"
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int = 50
    checkpoint_minutes: float = 0.0
    keep_checkpoints: int = 2
    early_stopping_patience: int = 0
    eval_every: int = 0
    digest_every: int = 0
    save_dtype: str = "float32"
    tensorboard: bool = False
    strict: bool = False
    trust_remote_code: bool = False
    activation_checkpointing: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "output", "model", "gguf_file", "eval_data", "token_cache"):
            self._path(name)
        self._resolve_batch()
        if self.micro_batch_tokens != "auto":
            self._integer("micro_batch_tokens", 1)
        for name, low in (("max_length", 2), ("steps", 1)):
            if getattr(self, name) is not None:
                self._integer(name, low)
        for name, low in (
            ("seed", 0), ("checkpoint_every", 0), ("keep_checkpoints", 1), ("eval_every", 0),
            ("digest_every", 0), ("early_stopping_patience", 0), ("activation_checkpointing", 0),
        ):
            self._integer(name, low)
        if self.seed >= 2**63:
            raise InputError(f"seed = {self.seed}: allowed is an integer from 0 below 2**63")
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"steps = {self.steps} and epochs = {self.epochs}: give one of the two")
        if self.steps is None and self.epochs is None:
            self._set("epochs", 1.0)
        if self.epochs is not None:
            self._number("epochs", "above 0", lambda v: v > 0)
        self._number("learning_rate", "above 0", lambda v: v > 0)
        self._number("warmup_ratio", "from 0 to below 1", lambda v: 0 <= v < 1)
        self._number("weight_decay", "0 or more", lambda v: v >= 0)
        self._number("loraplus_lr_ratio", "above 0", lambda v: v > 0)
        self._number("label_smoothing", "from 0 to below 1", lambda v: 0 <= v < 1)
        self._number("z_loss", "0 or more", lambda v: v >= 0)
        self._number("checkpoint_minutes", "0 (off) or more", lambda v: v >= 0)
        if self.early_stopping_patience and not self.eval_data:
            raise InputError(f"early_stopping_patience = {self.early_stopping_patience}: needs eval_data to judge by")
        if self.max_grad_norm is not None:
            self._number("max_grad_norm", "0 (off) or more", lambda v: v >= 0)
        self._number(
            "gradient_scale", "a power of two from 2**-40 to 2**40",
            lambda v: v > 0 and math.frexp(v)[0] == 0.5 and 2.0**-40 <= v <= 2.0**40,
        )
        self._set("dtype", DTYPE_SHORT.get(self.dtype, self.dtype))
        self._set("save_dtype", DTYPE_SHORT.get(self.save_dtype, self.save_dtype))
        self._choice("lr_scheduler", SCHEDULERS)
        if not isinstance(self.lr_scheduler_kwargs, dict):
            raise InputError(f"lr_scheduler_kwargs = {self.lr_scheduler_kwargs!r}: allowed is a dictionary of settings by name")
        if self.lr_scheduler_kwargs and self.lr_scheduler.startswith("constant"):  # transformers drops them
            raise InputError(f"lr_scheduler_kwargs = {self.lr_scheduler_kwargs!r}: {self.lr_scheduler} takes none")
        self._choice("on_bad_row", ("refuse", "skip"))
        self._choice("on_long_row", ("refuse", "skip", "truncate"))
        self._choice("device", DEVICES)
        self._choice("dtype", DTYPES)
        self._choice("save_dtype", DTYPES[1:])
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise InputError(f"{field.name} = {getattr(self, field.name)!r}: allowed are true and false")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite: give one of the two")

    def _resolve_batch(self) -> None:
        names = ("micro_batch_size", "gradient_accumulation_steps")
        for name in ("batch_size", *names):
            if getattr(self, name) is not None:
                self._integer(name, 1)
        if all(getattr(self, name) is None for name in names):
            self._set("batch_size", DEFAULT_BATCH if self.batch_size is None else self.batch_size)
            return
        product = math.prod(getattr(self, name) or 1 for name in names)
        if self.batch_size is not None and self.batch_size != product:
            raise InputError(
                f"batch_size = {self.batch_size}, but micro_batch_size x gradient_accumulation_steps = "
                f"{product}: give the batch once, or the same number"
            )
        self._set("batch_size", product)

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)

    def _path(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name not in ("data", "output"):
            return
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise InputError(f"{name} = {value!r}: allowed is a path")
        self._set(name, str(value))

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            extra = ' (or "auto")' if name == "micro_batch_tokens" else ""
            raise InputError(f"{name} = {value!r}: allowed is an integer of at least {low}{extra}")

    def _number(self, name: str, allowed: str, test) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not test(value):
            raise InputError(f"{name} = {value!r}: allowed is a number {allowed}")
        self._set(name, float(value))

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise InputError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")

    def as_dict(self) -> dict:
        """Every field with its resolved value, in the order of the class."""
        return dataclasses.asdict(self)

    def to_repeat(self) -> dict:
        """:meth:`as_dict` without what one command decides for itself: whether a run is gone on with or replaced."""
        return {name: value for name, value in self.as_dict().items() if name not in OF_THE_COMMAND}

    @property
    def folder(self) -> pathlib.Path:
        """The output folder as a path."""
        return pathlib.Path(self.output)


# Fields that decide the adapter's bytes: a checkpoint of other values is refused by --resume. Model, data,
# number of steps and dtype are compared as they came out, not as they were asked for.
DECIDES_BYTES = (
    "batch_size", "learning_rate", "lr_scheduler", "lr_scheduler_kwargs", "warmup_ratio", "weight_decay", "loraplus_lr_ratio",
    "max_grad_norm", "gradient_scale", "label_smoothing", "z_loss", "seed", "shuffle",
)


def learning_rates(config: TrainConfig, steps: int) -> list[float]:
    """The rate of each of ``steps`` optimiser steps, from :func:`transformers.get_scheduler`.

    The schedule is read one step late, over ``steps + 1`` steps with one more of warm-up, so that neither
    the first step of a warm-up nor the last of a decay has rate 0: with w warm-up steps the rates begin
    peak * 1/(w+1), 2/(w+1), ... and the peak is reached at step w+1. Computed once, on a parameter of its
    own: a resumed run needs no scheduler state.

    Raises:
        InputError: ``lr_scheduler_kwargs`` that the schedule does not take, lacks, or that give a rate of 0 or below, or not finite.
    """
    import torch
    import transformers

    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    try:
        schedule = transformers.get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=warmup + 1, num_training_steps=steps + 1,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"lr_scheduler_kwargs = {config.lr_scheduler_kwargs!r}: {config.lr_scheduler} does not take them as they "
                         f"are ({error})") from error
    rates = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    odd = next((i for i, rate in enumerate(rates) if not 0 < rate < math.inf), None)
    if odd is not None:
        raise InputError(f"lr_scheduler_kwargs = {config.lr_scheduler_kwargs!r}: they give step {odd + 1} of {steps} the rate "
                         f"{rates[odd]}; allowed are finite rates above 0")
    return rates


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimiser steps of the run over ``rows`` rows; an epoch's last batch may be smaller, never dropped."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * math.ceil(rows / config.batch_size) - 1e-9))
