"""``fastlora train``: from flags to a run."""

from __future__ import annotations

from typing import Annotated

import typer

from fastlora.errors import InputError

HUGE = "which changes time and memory, never the result"


def _option(*names: str, help: str, **more):
    return typer.Option(*names, help=help, show_default=False, **more)


def train(
    model: Annotated[str | None, _option("--model", help="Folder of the base model, or a hub name "
                                         "owner/name, which is fetched.")] = None,
    gguf_file: Annotated[str | None, _option("--gguf-file", help="GGUF file inside the model's folder; found "
                                             "by itself if it is the only one.")] = None,
    data: Annotated[str | None, _option("--data", help="JSONL, JSON or Parquet file to train on, or a "
                                        "folder or a glob of them.")] = None,
    eval_data: Annotated[str | None, _option("--eval-data", help="The same, only evaluated.")] = None,
    token_cache: Annotated[str | None, _option("--token-cache", help="Folder for the tokens of large data, used again by "
                                               "later runs. [fastlora-tokens beside the output]")] = None,
    output: Annotated[str | None, _option("--output", help="Folder for adapter, log, report, "
                                          "checkpoints.")] = None,
    rank: Annotated[int | None, _option("--rank", help="LoRA rank r. [16]")] = None,
    lora_alpha: Annotated[float | None, _option("--lora-alpha", help="LoRA alpha. [the rank]")] = None,
    lora_dropout: Annotated[float | None, _option("--lora-dropout", help="Dropout before A. [0]")] = None,
    use_rslora: Annotated[bool | None, _option("--use-rslora/--no-use-rslora", help="Scale by alpha / "
                                               "sqrt(r).")] = None,
    init_lora_weights: Annotated[str | None, _option(
        "--init-lora-weights", help="true: A Kaiming-uniform, B zero; gaussian: A normal; false: both drawn. [true]")] = None,
    use_dora: Annotated[bool | None, _option("--use-dora", help="Refused, with the reason.", hidden=True)] = None,
    modules_to_save: Annotated[str | None, _option(
        "--modules-to-save", help="Refused, with the reason.", hidden=True)] = None,
    target_modules: Annotated[str | None, _option(
        "--target-modules", help="Names with commas between (an untied lm_head too), one regular expression, or "
        "all-linear. [the seven projections]")] = None,
    target_parameters: Annotated[str | None, _option(
        "--target-parameters", help="Names of expert weights with commas between, such as mlp.experts.gate_up_proj. [none]")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", help="Sequences per optimiser step. [16]")] = None,
    micro_batch_size: Annotated[int | None, _option(
        "--micro-batch-size", help="With the next: their product is the batch.")] = None,
    gradient_accumulation_steps: Annotated[int | None, _option(
        "--gradient-accumulation-steps", help="See --micro-batch-size.")] = None,
    micro_batch_tokens: Annotated[str | None, _option(
        "--micro-batch-tokens", help=f"Most padded tokens in one forward, {HUGE}. [auto]")] = None,
    activation_checkpointing: Annotated[int | None, _option(
        "--activation-checkpointing", help="Every n-th layer runs again in the backward instead of keeping its "
        f"activations, {HUGE}; 0 for none, 1 for all. [0]")] = None,
    max_length: Annotated[int | None, _option("--max-length", help="Longest row in tokens. [the model's "
                                              "number of positions]")] = None,
    steps: Annotated[int | None, _option("--steps", help="Optimiser steps, or:")] = None,
    epochs: Annotated[float | None, _option("--epochs", help="Passes over the data. [1]")] = None,
    learning_rate: Annotated[float | None, _option("--learning-rate", help="Peak rate. [2e-4]")] = None,
    lr_scheduler: Annotated[str | None, _option("--lr-scheduler", help="As transformers names it. "
                                                "[linear]")] = None,
    lr_scheduler_kwargs: Annotated[str | None, _option(
        "--lr-scheduler-kwargs", help="Further settings of the schedule as JSON, by transformers' names.")] = None,
    warmup_ratio: Annotated[float | None, _option("--warmup-ratio", help="Share of the steps. [0.03]")] = None,
    weight_decay: Annotated[float | None, _option("--weight-decay", help="Decoupled. [0]")] = None,
    loraplus_lr_ratio: Annotated[float | None, _option(
        "--loraplus-lr-ratio", help="LoRA+: rate of B over the rate of A, which is --learning-rate; its authors use 16. "
        "[1]")] = None,
    max_grad_norm: Annotated[float | None, _option("--max-grad-norm", help="Clip norm, 0 for none. "
                                                   "[1.0]")] = None,
    gradient_scale: Annotated[float | None, _option(
        "--gradient-scale", help="Power of two that lifts small gradients above the fixed point. [1]")] = None,
    label_smoothing: Annotated[float | None, _option(
        "--label-smoothing", help="Share of the loss spread over the vocabulary; training only. [0]")] = None,
    z_loss: Annotated[float | None, _option(
        "--z-loss", help="Coefficient of the squared log normaliser, PaLM's 1e-4 for instance; training only. "
        "[0]")] = None,
    seed: Annotated[int | None, _option("--seed", help="Of A, of the order, of dropout. [0]")] = None,
    shuffle: Annotated[bool | None, _option("--shuffle/--no-shuffle", help="A seeded permutation each epoch, "
                                            "or the file's order. [shuffle]")] = None,
    on_bad_row: Annotated[str | None, _option("--on-bad-row", help="refuse or skip. [refuse]")] = None,
    on_long_row: Annotated[str | None, _option("--on-long-row", help="refuse, skip or truncate. "
                                               "[refuse]")] = None,
    device: Annotated[str | None, _option("--device", help="auto, cuda or cpu. [auto]")] = None,
    dtype: Annotated[str | None, _option("--dtype", help="Of the base model: auto, float32, bfloat16, float16. "
                                         "auto is bf16 on CUDA, fp32 on CPU. [auto]")] = None,
    checkpoint_every: Annotated[int | None, _option("--checkpoint-every", help="Steps; 0: only at the end. "
                                                    "[50]")] = None,
    checkpoint_minutes: Annotated[float | None, _option("--checkpoint-minutes", help="Minutes between checkpoints, beside "
                                                        "the steps; 0: by steps alone. [0]")] = None,
    keep_checkpoints: Annotated[int | None, _option("--keep-checkpoints", help="How many stay, beside the one with the "
                                                    "lowest held-out loss. [2]")] = None,
    early_stopping_patience: Annotated[int | None, _option(
        "--early-stopping-patience", help="End after so many evaluations without a new lowest held-out loss; 0: never. "
        "[0]")] = None,
    eval_every: Annotated[int | None, _option("--eval-every", help="Steps; 0: four times a run. [0]")] = None,
    digest_every: Annotated[int | None, _option("--digest-every", help="Steps between MD5s in the log; 0: at "
                                                "checkpoints. [0]")] = None,
    save_dtype: Annotated[str | None, _option("--save-dtype", help="Of the adapter file. [float32]")] = None,
    tensorboard: Annotated[bool | None, _option("--tensorboard/--no-tensorboard", help="Also write "
                                                "TensorBoard scalars.")] = None,
    strict: Annotated[bool | None, _option("--strict/--no-strict", help="Refuse anything but the fast "
                                           "path.")] = None,
    trust_remote_code: Annotated[bool | None, _option(
        "--trust-remote-code/--no-trust-remote-code", help="Run code from the model's folder.")] = None,
    config: Annotated[str | None, _option("--config", help="TOML file of settings, as advise and every run write it "
                                          "(run.toml); flags given here win.")] = None,
    resume: Annotated[bool, _option("--resume", help="Go on with the run in --output; flags not given are read "
                                    "from its run.toml.")] = False,
    overwrite: Annotated[bool, _option("--overwrite", help="Replace the run in --output.")] = False,
) -> None:
    """Train a LoRA adapter. The batch is --batch-size sequences per optimiser step; how it is cut is free."""
    given = {name: value for name, value in locals().items() if value is not None}
    lora_given = {field: given.pop(flag) for flag, field in _LORA.items() if flag in given}
    result = run(given, lora_given)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


_LORA = {"rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
         "target_modules": "target_modules", "target_parameters": "target_parameters", "init_lora_weights": "init_lora_weights",
         "use_dora": "use_dora", "modules_to_save": "modules_to_save"}


def run(given: dict, lora_given: dict, console=None):
    """Train with the settings given by name (fields of TrainConfig and of LoraConfig); returns TrainResult.

    Raises:
        InputError, TrainingError: see :class:`fastlora.train.Trainer`.
    """
    from fastlora import config_file, rundir
    from fastlora.train_config import TrainConfig

    given = dict(given)
    file, stored = given.pop("config", None), {}
    if file is not None and given.get("resume"):
        raise InputError(f"config = {file!r} and resume: give one of the two; --resume reads the run.toml in --output")
    if file is not None:
        stored = config_file.read_config(file)
    elif given.get("resume") and given.get("output"):
        stored = rundir.stored_run(given["output"])
    settings = config_file.train_settings(stored.get("train", {}), given)
    for name in ("model", "data", "output"):
        if not settings.get(name):
            raise InputError(f"{name}: missing; give --{name}")
    if "micro_batch_tokens" in settings:
        settings["micro_batch_tokens"] = micro_batch_setting(settings["micro_batch_tokens"])
    if isinstance(settings.get("lr_scheduler_kwargs"), str):
        settings["lr_scheduler_kwargs"] = _json(settings["lr_scheduler_kwargs"])
    config = TrainConfig(**settings)
    init = lora_given.get("init_lora_weights")
    if isinstance(init, str):
        lora_given["init_lora_weights"] = {"true": True, "false": False}.get(init.lower(), init)
    if isinstance(lora_given.get("target_modules"), str):
        lora_given["target_modules"] = _targets(lora_given["target_modules"])
    if isinstance(lora_given.get("target_parameters"), str):
        lora_given["target_parameters"] = _names(lora_given["target_parameters"])
    lora = config_file.lora_config(stored.get("lora"), lora_given, config.model, file or rundir.RUN)
    return start(config, lora, console, stored if file is not None else None)


def start(config, lora, console=None, stored=None):
    """Load model and tokenizer by ``config`` and train.

    Args:
        stored: tables of the ``run.toml`` this is to repeat; what differs from it is said before the first step.
    """
    from fastlora import rundata, rundir, setup
    from fastlora.train import Trainer

    rundir.check(config)
    rundata.check(config)
    model, tokenizer = setup.load(config, typer.echo)
    return Trainer(model, tokenizer, config, lora, console=console, stored=stored).train()


def micro_batch_setting(given: str | int | None) -> str | int | None:
    """What ``--micro-batch-tokens`` means: an integer, "auto", or None if it was not given.

    Raises:
        InputError: neither a whole number nor "auto".
    """
    if not isinstance(given, str) or given == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise InputError(f'micro_batch_tokens = {given!r}: allowed is a positive integer or "auto"') from None


def _json(text: str) -> dict:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"lr_scheduler_kwargs = {text!r}: not JSON ({error}); allowed is an object such as "
                         '{"min_lr_rate": 0.1}') from error


def _targets(text: str) -> list[str] | str:
    """Names between commas as a list; "all-linear" or a regular expression as it is."""
    if text == "all-linear" or set(text) & set("()[]|*+?^$\\"):
        return text
    return _names(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
