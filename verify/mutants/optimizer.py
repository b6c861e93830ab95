"""Faults of the optimiser, as other update rules in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.mutants.base import Mutant, Wrapped
from verify.oracle.adamw import AdamWOracle, clip_coefficient


def _rule(step) -> callable:
    """An optimiser with ``step(oracle, gradients)`` in place of the oracle's; results rounded to
    fp32."""

    def wrap(part):
        def run(parameters, gradients, hyper):
            oracle, after = AdamWOracle(parameters, hyper), []
            for gradient in gradients:
                after.append({name: p.float() for name, p in step(oracle, gradient).items()})
            return after

        return Wrapped(part, run=run)

    return wrap


def _no_bias_correction(oracle: AdamWOracle, gradients):
    oracle.steps = 10**9
    return oracle.step(gradients)


def _decay_in_gradient(oracle: AdamWOracle, gradients):
    """L2 regularisation instead of decoupled decay."""
    decay, oracle.hyper = oracle.hyper.weight_decay, replace(oracle.hyper, weight_decay=0.0)
    mixed = {name: g.double() + decay * oracle.parameters[name] for name, g in gradients.items()}
    after = oracle.step(mixed)
    oracle.hyper = replace(oracle.hyper, weight_decay=decay)
    return after


def _clip_each(oracle: AdamWOracle, gradients):
    """Each tensor is clipped by its own norm."""
    hyper = oracle.hyper
    own = {
        n: g.double() * clip_coefficient({n: g}, hyper.max_grad_norm) for n, g in gradients.items()
    }
    oracle.hyper = replace(hyper, max_grad_norm=None)
    after = oracle.step(own)
    oracle.hyper = hyper
    return after


def _eps_inside(oracle: AdamWOracle, gradients):
    """The root is taken of v + eps."""
    before, hyper = dict(oracle.parameters), oracle.hyper
    oracle.step(gradients)
    for name in before:
        first = oracle.first[name] / (1 - hyper.betas[0] ** oracle.steps)
        second = oracle.second[name] / (1 - hyper.betas[1] ** oracle.steps)
        decayed = before[name] * (1 - hyper.lr * hyper.weight_decay)
        oracle.parameters[name] = decayed - hyper.lr * first / (second + hyper.eps).sqrt()
    return dict(oracle.parameters)


def _sixteen_bit(oracle: AdamWOracle, gradients):
    """Parameters kept in bf16: small updates round to nothing."""
    after = oracle.step(gradients)
    oracle.parameters = {name: p.to(torch.bfloat16).double() for name, p in after.items()}
    return dict(oracle.parameters)


def _updates(name: str, sentence: str, step) -> Mutant:
    return Mutant(name, sentence, "optimizer", "updates", _rule(step))


MUTANTS = (
    _updates(
        "no bias correction", "moments are not corrected for their start at 0", _no_bias_correction
    ),
    _updates("decay in the gradient", "weight decay goes through the moments", _decay_in_gradient),
    _updates("clipped tensor by tensor", "every tensor is clipped by its own norm", _clip_each),
    _updates("eps inside the root", "the update divides by sqrt(v + eps)", _eps_inside),
    _updates("16-bit parameters", "parameters are kept in bf16", _sixteen_bit),
)
