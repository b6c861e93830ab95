"""Four common tolerance rules, tried on the planted faults: which of them would have seen each?

The rules are those found in the tests of public kernel libraries: ``allclose`` at 1e-2; a norm of the difference below 1e-2
of the reference's; an error at most twice that of the plain computation in the same dtype; a largest difference below 0.3.
They judge what such tests judge: inputs as they are in a model, and an adapter as it is after a few optimiser steps. A rule
has seen a fault if it accepts the sound subject and rejects the faulty one on some input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from verify.mutants.base import Mutant
from verify.oracle.adamw import AdamWOracle, Hyper
from verify.oracle.linear import drop, lora_linear_backward, lora_linear_forward, scale_of
from verify.plain import TorchAdamW
from verify.strategies import DTYPES, cuts_of
from verify.subject import GRAD, Documents, LinearInputs, LinearResult, Packed, Subject, TrainCase


@dataclass(frozen=True)
class Compared:
    """One tensor: what the subject gave, what a test would compare it with, the exact value, and a plain computation.

    ``own``: the last three come from the inputs and the mask that the subject says it used, not from a sound run.
    """

    got: torch.Tensor
    want: torch.Tensor
    exact: torch.Tensor
    plain: torch.Tensor
    own: bool = False


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# tolerance-rule: the rules on trial, as people write them; nothing of the library is judged by these.
RULES: dict[str, Callable[[Compared], bool]] = {
    "allclose 1e-2": lambda c: torch.allclose(c.got, c.want, rtol=1e-2, atol=1e-2),  # tolerance-rule: on trial
    "norm 1e-2": lambda c: float((c.got - c.want).norm()) <= 1e-2 * float(c.want.norm()),
    "twice plain": lambda c: _largest(c.got - c.exact) <= 2 * _largest(c.plain - c.exact),
    "within 0.3": lambda c: _largest(c.got - c.want) <= 0.3,
}
Found = dict[str, Compared]


def seen_by_rules(mutant: Mutant, subject: Subject) -> dict[str, bool | None]:
    """For each rule whether it would have seen the fault; None where no such test is written for this part."""
    probe = _PROBES.get(mutant.part)
    if probe is None:
        return dict.fromkeys(RULES)
    sound, faulty = probe(subject), probe(mutant.plant(subject))
    return {
        name: any(rule(sound[key]) and not rule(found) for key, found in _against(sound, faulty).items())
        for name, rule in RULES.items()
    }


def _against(sound: Found, faulty: Found) -> Found:
    """The faulty results beside their references; a wrong shape counts as all wrong."""
    found = {}
    for key, one in sound.items():
        if key not in faulty:
            continue
        reference, got = (faulty[key] if one.own else one), faulty[key].got
        got = got if got.shape == one.want.shape else torch.full_like(one.want, float("nan"))
        found[key] = dataclasses.replace(reference, got=got)
    return found


def _inputs(dtype: torch.dtype, device: str, seed: int) -> LinearInputs:
    """A layer as in a model: weight of 1/sqrt(K), x and dy of unit size, A as initialised, B after a few steps of 2e-4, alpha = r."""
    m, k, n, r = 72, 160, 96, 8
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    a = (torch.rand((r, k), generator=draw, dtype=torch.float64) * 2 - 1) * k**-0.5
    tensors = [normal(m, k), normal(n, k) * k**-0.5, a, normal(n, r) * 1e-3, normal(n) * 0.02, normal(n, m).T]
    x, weight, a, b, bias, dy = (t.to(device) for t in tensors)
    return LinearInputs(
        x.to(dtype), weight.to(dtype), a.float(), b.float(), bias.to(dtype), dy.to(dtype), float(r), seed % 2 == 1,
        0.1 if seed >= 2 else 0.0, torch.randint(0, 2**62, (m,), generator=draw).to(device), seed,
    )  # fmt: skip


def _plain(inputs: LinearInputs, keep: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Every step in the working dtype."""
    dtype, scale = inputs.x.dtype, scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    a, b = inputs.a.to(dtype), inputs.b.to(dtype)
    dropped = drop(inputs.x, keep, inputs.dropout).to(dtype)
    s, ds = scale * (dropped @ a.T), scale * (inputs.dy @ b)
    y = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias) + s @ b.T
    dx = inputs.dy @ inputs.weight + drop(ds @ a, keep, inputs.dropout).to(dtype)
    return {"y": y, "dx": dx, "da": ds.T @ dropped, "db": inputs.dy.T @ s}


def _of_linear(subject: Subject) -> Found:
    found: Found = {}
    for name, dtype in DTYPES.items():
        if dtype not in subject.linear.dtypes:
            continue
        for seed in range(4):
            inputs = _inputs(dtype, subject.device, seed)
            for mode in subject.linear.modes:
                result = subject.linear.run(inputs, mode)
                for key, one in _compared(inputs, result).items():
                    found[f"{name} {seed} {mode} {key}"] = one
    return found | _of_documents(subject)


def _compared(inputs: LinearInputs, result: LinearResult) -> Found:
    keep = None if result.keep is None else result.keep.to(inputs.x.device)
    scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    y = lora_linear_forward(inputs.x, inputs.weight, inputs.a, inputs.b, scale, inputs.bias, keep=keep, p=inputs.dropout)
    back = lora_linear_backward(inputs.dy, inputs.x, inputs.weight, inputs.a, inputs.b, scale, keep=keep, p=inputs.dropout)
    exact, plain = {"y": y, "dx": back.dx, "da": back.da, "db": back.db}, _plain(inputs, keep)
    return {
        name: Compared(getattr(result, name).double(), exact[name], exact[name], plain[name].double(), own=True)
        for name in exact
    }


def _of_documents(subject: Subject) -> Found:
    """Three documents in two micro-batches and in one: the token sums."""
    dtype = subject.linear.dtypes[-1]
    found: Found = {}
    for seed in (0, 2):
        one = _inputs(dtype, subject.device, seed)
        sizes = [20, 12, 40]
        xs, dys = one.x.split(sizes), one.dy.split(sizes)
        for cut in (((0, 1, 2),), ((0, 1), (2,))):
            parts = [
                Documents(group, [xs[i] for i in group], [dys[i] for i in group], one.weight, one.a, one.b, one.alpha,
                          one.dropout, seed)
                for group in cut
            ]  # fmt: skip
            result = subject.linear.accumulate(parts, subject.linear.modes[-1])
            plain = result if subject.linear.modes[-1] == GRAD else subject.linear.accumulate(parts, GRAD)
            for name in ("da", "db"):
                got, other = getattr(result, name).double(), getattr(plain, name).double()
                found[f"{seed} {len(cut)} {name}"] = Compared(got, got, got, other)
    return found


def _of_optimizer(subject: Subject) -> Found:
    found: Found = {}
    for seed, hyper in enumerate((Hyper(), Hyper(lr=1e-3, weight_decay=0.01, max_grad_norm=1.0))):
        draw = torch.Generator().manual_seed(seed)
        before = {"lora_A": torch.randn(8, 64, generator=draw) / 8, "lora_B": torch.zeros(32, 8)}
        steps = [{n: torch.randn(p.shape, generator=draw) * 1e-2 for n, p in before.items()} for _ in range(3)]
        oracle = AdamWOracle(before, hyper)
        exact = [oracle.step(step) for step in steps]
        parts = subject.optimizer, TorchAdamW()
        runs = [part.run({n: p.clone() for n, p in before.items()}, steps, hyper) for part in parts]
        for i, (want, got, plain) in enumerate(zip(exact, *runs)):
            for name in want:
                found[f"{seed} {i} {name}"] = Compared(got[name].double(), want[name], want[name], plain[name].double())
    return found


def _of_trainer(subject: Subject) -> Found:
    """Gradients and adapters of two steps, of a batch in pairs."""
    case = TrainCase(lengths=(9, 17, 5, 24, 12), hyper=Hyper(), dropout=0.1)
    cut = cuts_of(len(case.lengths), 0)["pairs"]
    result = subject.trainer.train(case, cut)
    floats = subject.trainer.train(case, cut, float_sums=True)
    found = {}
    for kind in ("gradients", "after"):
        for i, (step, plain) in enumerate(zip(getattr(result, kind), getattr(floats, kind))):
            for name, tensor in step.items():
                got = tensor.double()
                found[f"{kind} {i} {name}"] = Compared(got, got, got, plain.get(name, tensor).double())
    return found


def _of_operations(subject: Subject) -> Found:
    """Every operation on one stream of three documents; the plain result is that of the widest dtype."""
    part, found = subject.operations, {}
    for operation in part.operations:
        results = []
        for dtype in (part.dtypes[-1], part.dtypes[0]):
            draw = torch.Generator().manual_seed(0)
            lengths = (40, 17, 100)
            total = sum(-(-n // part.alignment) * part.alignment for n in lengths)
            x, dy = (
                torch.randn(total, width, generator=draw).to(part.dtypes[-1]).to(subject.device, dtype)
                for width in (operation.features, operation.outputs)
            )
            packed = Packed(lengths, (5, 6, 7), part.alignment, x, dy, 3)
            results.append(operation.run(packed))
        for name, values in results[0].items():
            for i, value in enumerate(values):
                got, wide = value.double(), results[1][name][i].double()
                found[f"{operation.name} {name} {i}"] = Compared(got, got, wide, got)
    return found


_PROBES: dict[str, Callable[[Subject], Found]] = {
    "linear": _of_linear, "optimizer": _of_optimizer, "trainer": _of_trainer, "operations": _of_operations,
}  # fmt: skip
