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


def _clip_parts(oracle: AdamWOracle, gradients):
    """The gradient came from two micro-batches (here: of even and of odd columns), each clipped by its own norm."""
    hyper = oracle.hyper
    halves = [{n: g.double() * (torch.arange(g.shape[1]) % 2 == i) for n, g in gradients.items()} for i in (0, 1)]
    clips = [clip_coefficient(half, hyper.max_grad_norm) for half in halves]
    oracle.hyper = replace(hyper, max_grad_norm=None)
    after = oracle.step({n: halves[0][n] * clips[0] + halves[1][n] * clips[1] for n in gradients})
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


def _eps_corrected(oracle: AdamWOracle, gradients):
    """eps is added before the correction of the second moment, so that it is scaled with it."""
    hyper = oracle.hyper
    corrected = (1 - hyper.betas[1] ** (oracle.steps + 1)) ** 0.5
    oracle.hyper = replace(hyper, eps=hyper.eps / corrected)
    after = oracle.step(gradients)
    oracle.hyper = hyper
    return after


def _first_rows(oracle: AdamWOracle, gradients):
    """As many elements are updated as the tensor has rows."""
    before = dict(oracle.parameters)
    after = oracle.step(gradients)
    for name, parameter in after.items():
        held = before[name].flatten().clone()
        held[: len(parameter)] = parameter.flatten()[: len(parameter)]
        oracle.parameters[name] = held.view_as(parameter)
    return dict(oracle.parameters)


def _counts_from_two(oracle: AdamWOracle, gradients):
    """The step counter is one ahead."""
    oracle.steps = max(oracle.steps, 1)
    return oracle.step(gradients)


def _moments_in_bf16(oracle: AdamWOracle, gradients):
    after = oracle.step(gradients)
    for moments in (oracle.first, oracle.second):
        moments.update({name: m.bfloat16().double() for name, m in moments.items()})
    return after


def _decay_without_rate(oracle: AdamWOracle, gradients):
    """The decay is not multiplied by the rate."""
    hyper = oracle.hyper
    if hyper.lr:
        oracle.hyper = replace(hyper, weight_decay=hyper.weight_decay / hyper.lr)
    after = oracle.step(gradients)
    oracle.hyper = hyper
    return after


def _last_element(oracle: AdamWOracle, gradients):
    """The last element of every tensor is never updated."""
    last = {name: p[-1, -1].clone() for name, p in oracle.parameters.items()}
    after = oracle.step(gradients)
    for name, parameter in after.items():
        parameter[-1, -1] = last[name]
    return after


def _updates(name: str, sentence: str, step, modelled_on: str = "") -> Mutant:
    return Mutant(name, sentence, "optimizer", "updates", _rule(step), group="optimiser", modelled_on=modelled_on)


MUTANTS = (
    _updates("no bias correction", "moments are not corrected for their start at 0", _no_bias_correction,
             "ml-explore/mlx#1640"),
    _updates("decay in the gradient", "weight decay goes through the moments", _decay_in_gradient,
             "keras-team/keras#19051"),
    _updates("decay without the rate", "weight decay is not multiplied by the rate", _decay_without_rate),
    _updates("clipped tensor by tensor", "every tensor is clipped by its own norm", _clip_each),
    _updates("clipped before the sum", "every micro-batch's gradient is clipped by its own norm", _clip_parts,
             "huggingface/transformers#1563"),
    _updates("eps inside the root", "the update divides by sqrt(v + eps)", _eps_inside),
    _updates("eps before the correction", "eps is scaled by the second moment's bias correction", _eps_corrected,
             "aiqm/torchani#261"),
    _updates("step counter one ahead", "bias correction begins at step 2", _counts_from_two),
    _updates("as many elements as rows", "an update covers size(0) elements of each tensor", _first_rows,
             "hpcaitech/ColossalAI#633"),
    _updates("one element never updated", "the last element of every tensor stays", _last_element),
    _updates("moments in bf16", "both moments are stored in bf16", _moments_in_bf16),
    _updates("16-bit parameters", "parameters are kept in bf16", _sixteen_bit),
)  # fmt: skip
