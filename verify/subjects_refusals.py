"""Bad inputs that fastlora must refuse, for the claim ``guards``: one argument wrong at a time, beside a good call."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fastlora
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.glu import glu
from fastlora.ops.linear_cross_entropy import linear_cross_entropy
from fastlora.ops.rms_norm import rms_norm
from verify.subject import Refusal

NAN = float("nan")


def refusals(device: str) -> tuple[Refusal, ...]:
    """Every bad input of the library's functions and configurations, on one device."""
    return (*_linear(device), *_operations(device), *_configurations(), *_training(device), *_files())


def _each(function: Callable, good: dict[str, Any], bad: list[tuple[str, str, Any]], what: str) -> Iterator[Refusal]:
    """``function`` with one argument of ``good`` replaced; ``bad``: (words of the message, argument, value)."""
    for words, name, value in bad:
        told = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)[:40]
        kind = f"{value.dtype} " if isinstance(value, torch.Tensor) else ""
        yield Refusal(
            f"{what}({name} = {kind}{told})",
            tuple(words.split("|")),
            lambda name=name, value=value: function(**{**good, name: value}),
            lambda: function(**good),
        )


def _linear(device: str) -> Iterator[Refusal]:
    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device)

    key = fastlora.DropoutKey(3, torch.arange(5, device=device))
    good = dict(
        x=made(5, 8), weight=made(6, 8), a=made(4, 8), b=made(6, 4), scale=1.0, bias=made(6), dropout=0.5, key=key
    )
    yield from _each(fastlora.lora_linear, good, [
        ("x", "x", made(5, 7)),
        ("x", "x", made(5, 8, dtype=torch.float64)),
        ("x|weight", "x", made(5, 8, dtype=torch.float16)),
        ("x", "x", torch.tensor(1.0, device=device)),
        ("weight", "weight", made(48)),
        ("weight", "weight", made(6, 8, dtype=torch.bfloat16)),
        ("weight", "weight", made(6, 8).requires_grad_()),
        ("a", "a", made(4, 7)),
        ("a", "a", made(32)),
        ("b", "b", made(6, 5)),
        ("b", "b", made(5, 4)),
        ("bias", "bias", made(5)),
        ("bias", "bias", made(6, dtype=torch.float16)),
        ("bias", "bias", made(6).requires_grad_()),
        ("dropout", "dropout", 1.0),
        ("dropout", "dropout", -0.1),
        ("dropout", "dropout", 2**-18),
        ("dropout", "dropout", 1 - 2**-18),
        ("dropout", "dropout", NAN),
        ("key", "key", None),
    ], "lora_linear")  # fmt: skip
    big = dict(good, a=made(256, 8), b=made(6, 256))
    yield Refusal(
        "lora_linear(rank 257)", ("a", "257", "256"),
        lambda: fastlora.lora_linear(**dict(good, a=made(257, 8), b=made(6, 257))), lambda: fastlora.lora_linear(**big),
    )  # fmt: skip
    yield Refusal(
        "lora_linear(rank 0)", ("a", "rank 0"), lambda: fastlora.lora_linear(**dict(good, a=made(0, 8), b=made(6, 0)))
    )
    short = fastlora.DropoutKey(3, torch.arange(4, device=device))
    yield Refusal(
        "lora_linear(key of 4 tokens for 5 rows)", ("key",), lambda: fastlora.lora_linear(**dict(good, key=short))
    )


def _operations(device: str) -> Iterator[Refusal]:
    x, w = torch.ones(5, 8, device=device), torch.ones(8, device=device)
    head, labels = torch.ones(6, 8, device=device), torch.tensor([0, 1, -100, 5, 2], device=device)
    frozen = torch.ones(6, 8, device=device).requires_grad_()
    yield from _each(rms_norm, dict(x=x, weight=w, eps=1e-6, style="offset"), [
        ("weight", "weight", w.clone().requires_grad_()), ("style", "style", "middle"),
    ], "rms_norm")  # fmt: skip
    yield from _each(glu, dict(gate=x, up=x, activation="silu"), [
        ("up", "up", torch.ones(5, 7, device=device)), ("up", "up", x.half()), ("activation", "activation", "relu6"),
    ], "glu")  # fmt: skip
    yield from _each(frozen_linear, dict(x=x, weight=head, bias=None), [
        ("weight", "weight", frozen), ("weight", "weight", head.half()),
    ], "frozen_linear")  # fmt: skip
    good = dict(hidden=x, weight=head, labels=labels, softcap=2.0, label_smoothing=0.1, z_loss=0.1)
    yield from _each(linear_cross_entropy, good, [
        ("weight", "weight", frozen),
        ("hidden", "hidden", torch.ones(5, 7, device=device)),
        ("labels", "labels", labels[:4]),
        ("labels|6", "labels", labels + 1 + 5 * (labels == -100)),
        ("labels", "labels", torch.tensor([0, 1, -99, 5, 2], device=device)),
        ("softcap", "softcap", 0.0),
        ("label_smoothing", "label_smoothing", 1.0),
        ("label_smoothing", "label_smoothing", NAN),
        ("z_loss", "z_loss", -1.0),
        ("z_loss", "z_loss", NAN),
    ], "linear_cross_entropy")  # fmt: skip


def _configurations() -> Iterator[Refusal]:
    good: dict[str, Any] = dict(r=8, lora_alpha=16)
    values = {
        "r": (0, 257, -1, 2.5, True, None, "8"),
        "lora_alpha": (0, -1.0, NAN, float("inf"), "16"),
        "lora_dropout": (1.0, -0.1, 2**-18, 1 - 2**-18, NAN, "0"),
        "use_rslora": (1, "yes"),
        "bias": ("all", "lora_only", None),
        "modules_to_save": (["lm_head"],),
        "init_lora_weights": ("pissa", 1.5),
        "task_type": ("CLM",),
        "target_modules": ([], "(", [1], 7),
        "exclude_modules": ("(", 7),
        "rank_pattern": ({"(": 4}, {"q_proj": 0}, ["q_proj"]),
        "alpha_pattern": ({"q_proj": -1}, {"(": 4}),
        "layers_to_transform": (-1, [0, 0], "0"),
    }
    bad = [(name, name, value) for name, many in values.items() for value in many]
    yield from _each(fastlora.LoraConfig, good, bad, "LoraConfig")
    values = {
        "data": (None, "", 3),
        "output": (None,),
        "batch_size": (0, 2.5, True),
        "micro_batch_size": (0,),
        "gradient_accumulation_steps": (0,),
        "micro_batch_tokens": ("many", 0),
        "max_length": (1,),
        "steps": (0, 1.5),
        "epochs": (0, NAN),
        "learning_rate": (0, -1e-4, NAN, "fast"),
        "lr_scheduler": ("warm",),
        "warmup_ratio": (1.0, -0.1),
        "weight_decay": (-0.1, NAN),
        "max_grad_norm": (-1.0, NAN),
        "gradient_scale": (3.0, 0.0),
        "label_smoothing": (1.0,),
        "z_loss": (-1.0,),
        "seed": (-1, 2**63),
        "shuffle": ("no",),
        "on_bad_row": ("drop",),
        "on_long_row": ("cut",),
        "device": ("tpu",),
        "dtype": ("int8",),
        "save_dtype": ("float8",),
    }
    bad = [(name, name, value) for name, many in values.items() for value in many]
    yield from _each(fastlora.TrainConfig, dict(data="rows.jsonl", output="out"), bad, "TrainConfig")
    many = dict(data="rows.jsonl", output="out")
    for extra, words in (
        (dict(steps=3, epochs=1.0), ("steps", "epochs")),
        (dict(resume=True, overwrite=True), ("resume", "overwrite")),
        (dict(batch_size=8, micro_batch_size=3, gradient_accumulation_steps=2), ("batch_size", "8", "6")),
    ):
        yield Refusal(f"TrainConfig({extra})", words, lambda extra=extra: fastlora.TrainConfig(**many, **extra))


def _net(device: str = "cpu") -> nn.Module:
    net = nn.ModuleDict({"proj": nn.Linear(8, 6), "other": nn.Linear(8, 6)}).to(device).requires_grad_(False)
    return fastlora.inject(net, fastlora.LoraConfig(r=2, target_modules=["proj"]), seed=0)


def _training(device: str) -> Iterator[Refusal]:
    def optimizer(**change):
        return fastlora.AdamW(_net(device), **change)

    values = {
        "lr": (-1.0, NAN, "fast"), "betas": ((1.0, 0.9), (0.9, -0.1)), "eps": (-1e-8, NAN),
        "weight_decay": (-0.1, NAN), "max_grad_norm": (-1.0, NAN),
    }  # fmt: skip
    bad = [(name, name, value) for name, many in values.items() for value in many]
    yield from _each(optimizer, dict(lr=1e-3), bad, "AdamW")
    yield Refusal("AdamW(model without trainable parameters)", ("model",),
                  lambda: fastlora.AdamW(nn.Linear(3, 3).requires_grad_(False)))  # fmt: skip
    yield Refusal(
        "inject twice",
        ("model", "eject"),
        lambda: fastlora.inject(_net(), fastlora.LoraConfig(target_modules=["proj"])),
    )
    yield Refusal("inject(config = {})", ("config",), lambda: fastlora.inject(nn.Linear(3, 3), {}))
    missing = fastlora.LoraConfig(target_modules=["nowhere"])
    yield Refusal(
        "inject(targets that match nothing)",
        ("nowhere",),
        lambda: fastlora.inject(nn.ModuleDict({"p": nn.Linear(3, 3)}), missing),
    )
    yield Refusal("merge of a model without adapters", ("model",), lambda: fastlora.merge(nn.Linear(3, 3)))
    yield Refusal(
        "unmerge of a model that is not merged",
        ("unmerge",),
        lambda: fastlora.unmerge(_net()),
        lambda: fastlora.unmerge(fastlora.merge(_net())),
    )
    yield Refusal("merge twice", ("proj", "merged"), lambda: fastlora.merge(fastlora.merge(_net())))

    def steps(tokens) -> None:
        net = _net(device)
        made = fastlora.AdamW(net, lr=1e-3)
        with fastlora.exact(net):
            net["proj"](torch.ones(2, 8, device=device)).sum().backward()
        made.step(supervised_tokens=tokens)

    yield from _each(
        steps,
        dict(tokens=3),
        [("supervised_tokens", "tokens", v) for v in (None, 0, -1, NAN)],
        "AdamW.step after exact",
    )

    def torch_optimizer() -> None:
        net = _net(device)
        with fastlora.exact(net):
            net["proj"](torch.ones(2, 8, device=device)).sum().backward()
        try:
            torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0).step()
        finally:
            from fastlora.exact import discard

            discard(net)

    yield Refusal("a torch optimiser on exact sums", ("optimizer", "fastlora.AdamW"), torch_optimizer)


def _files() -> Iterator[Refusal]:
    def damaged(change: Callable[[pathlib.Path], object]) -> Callable[[], object]:
        def call() -> None:
            with tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                fastlora.save_adapter(_net(), folder)
                change(folder)
                fresh = nn.ModuleDict({"proj": nn.Linear(8, 6), "other": nn.Linear(8, 6)})
                fastlora.load_adapter(fresh, folder)

        return call

    def edit(old: str, new: str) -> Callable[[pathlib.Path], object]:
        def change(folder: pathlib.Path) -> None:
            path = folder / "adapter_config.json"
            text = path.read_text(encoding="utf-8")
            if old not in text:
                raise ValueError(f"the file holds no {old!r}")
            path.write_text(text.replace(old, new), encoding="utf-8")

        return change

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    untouched = damaged(lambda folder: None)
    for told, words, change in (
        ("without its weights", (weights,), lambda folder: (folder / weights).unlink()),
        ("without its configuration", (config,), lambda folder: (folder / config).unlink()),
        (
            "with cut weights",
            (weights,),
            lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:-9]),
        ),
        ("with a configuration that is no JSON", (config,), lambda folder: (folder / config).write_text("{")),
        ("of another rank than its tensors", ("lora_A",), edit('"r": 2', '"r": 3')),
        ("with DoRA", ("use_dora",), edit('"use_dora": false', '"use_dora": true')),
        ("with trained biases", ("bias",), edit('"bias": "none"', '"bias": "all"')),
        ("without its alpha", ("lora_alpha",), edit('"lora_alpha": 2', '"lora_alpha": null')),
        ("of another kind", ("peft_type",), edit('"LORA"', '"IA3"')),
    ):
        yield Refusal(f"an adapter {told}", words, damaged(change), untouched)
