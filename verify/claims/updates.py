"""updates: a step changes what it must, by what AdamW says, and nothing else.

At step 1 with B = 0, dA is exactly 0, so A must not move (weight decay aside): "every tensor
changes" would be a wrong rule there. Adam's first update is about the rate times the sign of the
gradient, so updates are never compared across two gradients: the optimiser is judged on the
subject's own.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from verify.bounds import exact
from verify.claims.outcome import Budget, Outcome
from verify.graphs import AdamWBounds
from verify.judge import around, judge
from verify.oracle.adamw import AdamWOracle, Hyper, clip_coefficient
from verify.oracle.digest import md5_of_tensor
from verify.strategies import OptimizerCase, cuts_of, endless, trained_by
from verify.subject import Subject, TrainCase, TrainResult

NAME = "updates"
STATEMENT = (
    "Every parameter after a step lies within the rounding bound of float64 AdamW given the subject's own "
    "gradient; A stands still at step 1 while B is 0, everything moves by step 2, nothing at rate 0, and "
    "frozen weights keep their bytes."
)

# One training for this many optimiser cases.
ROUND = 10


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """Optimiser steps on drawn gradients and whole trainings by turns, in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    optimizer, trainer = subject.optimizer, subject.trainer
    if optimizer is None:
        out.reason = "the subject has no optimiser"
        return out
    steps = endless("optimizer", (), seed)
    trainings = trained_by(trainer, endless("train", (), seed)) if trainer else iter(())
    doubtful = 0
    while budget.more(out.cases) and not (budget.stop_at_failure and out.failures):
        training = trainer is not None and out.cases % ROUND == 0
        case = next(trainings if training else steps, None)
        if case is None:
            break
        out.cases += 1
        out.tags |= {subject.device, "fp32", *subject.tags}
        try:
            doubtful += (_training if training else _steps)(subject, case, out)
        # A crash of the subject is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {subject.name}, {case!r}")
    out.note(
        f"elements whose update is in doubt by half the rate or more: {doubtful}, counted, not judged"
    )
    out.seconds = time.monotonic() - begun
    return out


def _steps(subject: Subject, case: OptimizerCase, out: Outcome) -> int:
    """Drawn gradients: every parameter after every step against the oracle."""
    before, gradients = case.tensors()
    after = subject.optimizer.run(before, gradients, case.hyper)
    where = f"{subject.name}, {case!r}"
    doubtful = _against_oracle(subject, before, after, gradients, case.hyper, out, where)
    if case.hyper.lr == 0:
        still = all(torch.equal(after[-1][name].cpu(), before[name]) for name in before)
        out.check(still, f"a parameter moved at rate 0; {where}")
    elif case.zero_b and case.hyper.weight_decay == 0:
        same = torch.equal(after[0]["lora_A"].cpu(), before["lora_A"])
        out.check(same, f"A moved at step 1 though its gradient is 0; {where}")
    return doubtful


def _against_oracle(
    subject, before, after, gradients, hyper: Hyper, out: Outcome, where: str
) -> int:
    """Judge every step's parameters; the number of elements left out as doubtful."""
    optimizer = subject.optimizer
    oracle = AdamWOracle(before, hyper)
    bounds = {
        name: AdamWBounds(exact(p), hyper, arithmetic=optimizer.arithmetic)
        for name, p in before.items()
    }
    doubtful = 0
    for step, (got, gradient) in enumerate(zip(after, gradients), 1):
        clip, slack = clip_coefficient(gradient, hyper.max_grad_norm), 0.0
        if clip != 1.0:
            # A rule that divides by norm + epsilon is smaller by epsilon / norm at most.
            slack = optimizer.clip_epsilon * clip / hyper.max_grad_norm
        expected = oracle.step(gradient)
        for name, tracked in bounds.items():
            bound = tracked.step(gradient[name], clip, slack)
            bound = around(expected[name], bound)
            # Half a rate, beyond the rounding of the parameter itself: the sign of the update is
            # open.
            spacing = torch.finfo(torch.float32).eps * bound.value.abs()
            doubt = (bound.radius >= hyper.lr / 2 + 4 * spacing) & (hyper.lr > 0)
            doubtful += int(doubt.sum())
            bound = dataclasses.replace(bound, radius=bound.radius.masked_fill(doubt, float("inf")))
            judged = judge(got[name], bound)
            out.share(judged.share, f"step {step}: {judged.sentence(name)}; {where}")
    return doubtful


def _training(subject: Subject, case: TrainCase, out: Outcome) -> int:
    """A tiny model trained two steps: the first-step rules, frozen weights, and the oracle."""
    trainer, where = subject.trainer, f"{subject.name}, {case!r}"
    cut = cuts_of(len(case.lengths), case.seed)["pairs"]
    plain = dataclasses.replace(case, steps=max(2, case.steps))
    result = trainer.train(plain, cut)
    _first_steps(result, out, where)
    _measure_underflow(result, plain.hyper.lr, out)
    out.check(result.frozen[0] == result.frozen[1], f"frozen weights changed in training; {where}")
    if not out.rows:
        out.rows = report_rows(result.before, result.after[-1])
    doubtful = _against_oracle(
        subject, result.before, result.after, result.gradients, plain.hyper, out, where
    )
    decayed = dataclasses.replace(
        plain, steps=1, hyper=Hyper(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    )
    moved = trainer.train(decayed, cut)
    doubtful += _against_oracle(
        subject,
        moved.before,
        moved.after,
        moved.gradients,
        decayed.hyper,
        out,
        f"decay, clipping, {where}",
    )
    still = trainer.train(
        dataclasses.replace(plain, steps=1, hyper=Hyper(lr=0.0, weight_decay=0.1)), cut
    )
    same = all(torch.equal(still.before[name], still.after[0][name]) for name in still.before)
    out.check(same, f"a tensor moved at rate 0; {where}")
    return doubtful


# A learning rate that people use, at which 16 bits lose most updates of A.
SMALL_RATE = 1e-5


def _measure_underflow(result: TrainResult, rate: float, out: Outcome) -> None:
    """What the last step's updates, at a small rate, would do to parameters kept in bf16: a figure, no verdict."""
    if any("kept in bf16" in note for note in out.notes):
        return
    lost: dict[str, list[int]] = {"lora_A": [0, 0], "lora_B": [0, 0]}
    for name, start in result.after[-2].items():
        update = (result.after[-1][name] - start) * (SMALL_RATE / rate)
        held = start.bfloat16()
        # The update is added to the bf16 value and rounded, as a 16-bit optimiser does.
        same = (held.float() + update).bfloat16() == held
        counts = lost["lora_A" if "lora_A" in name else "lora_B"]
        counts[0] += int((same & (update != 0)).sum())
        counts[1] += int((update != 0).sum())
    told = " and ".join(f"{gone / max(all_of, 1):.0%} of those of {name[-1]}" for name, (gone, all_of) in lost.items())
    out.note(f"parameters kept in bf16 would lose updates to rounding at a rate of {SMALL_RATE:g}: {told}")


def _first_steps(result: TrainResult, out: Outcome, where: str) -> None:
    """B = 0 and no decay: A keeps its bits at step 1 and B moves; by the second step everything
    has."""
    for name, start in result.before.items():
        first, last = result.after[0][name], result.after[-1][name]
        if name.endswith("lora_A.weight"):
            out.check(torch.equal(first, start), f"{name} moved at step 1 while B is 0; {where}")
        else:
            out.check(not bool(start.any()), f"{name} does not start at 0; {where}")
            out.check(not torch.equal(first, start), f"{name} did not move at step 1; {where}")
        out.check(
            not torch.equal(last, start),
            f"{name} did not move in {len(result.after)} steps; {where}",
        )
        out.check(bool(last.isfinite().all()), f"{name} is not finite after training; {where}")


def report_rows(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[dict]:
    """A row for each tensor: MD5 before and after, sum and maximum of absolute differences, share
    changed."""
    rows = []
    for name in sorted(before):
        difference = (after[name].double() - before[name].double()).abs()
        rows.append(
            {
                "name": name,
                "md5_before": md5_of_tensor(before[name]),
                "md5_after": md5_of_tensor(after[name]),
                "sum_abs_diff": float(difference.sum()),
                "max_abs_diff": float(difference.max()),
                "share_changed": float((difference > 0).double().mean()),
            }
        )
    return rows
