"""PEFT as a subject: ``python -m verify --subject verify.peft_subject:SUBJECT`` (PEFT must be installed).

Its layer keeps A and B in fp32, adds the adapter's product to the base layer's stored output, and draws dropout from
torch's generator; torch's AdamW steps. Nothing about splits is promised by it; ``CLAIMING_BITS`` claims equal bits all the
same, to see ``splits`` say that they are not.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
from torch import nn

from verify.graphs import Roundings
from verify.oracle.philox import rate
from verify.plain import TorchAdamW
from verify.simple import FunctionLinear
from verify.subject import GRAD, BadSubject, LinearInputs, LinearResult, Subject


class PeftLinear(FunctionLinear):
    """``peft.tuners.lora.Linear`` around an ``nn.Linear`` of the working dtype."""

    def __init__(self, bitwise_splits: bool = False) -> None:
        super().__init__(self._unused, roundings=_roundings, bitwise_splits=bitwise_splits)

    @staticmethod
    def _unused(*arguments):
        raise NotImplementedError("run calls PEFT's layer")

    def run(self, inputs: LinearInputs, mode: str, divisor: float = 1.0) -> LinearResult:
        """Forward and backward of one layer in training mode, the mask taken from torch's generator."""
        model = _layer(inputs)
        layer, x = model.base_model.model.proj, inputs.x.detach().clone().requires_grad_()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(inputs.seed % 2**63)
            state = torch.get_rng_state()
            y = model(x)
            keep = None
            if inputs.dropout:
                torch.set_rng_state(state)
                keep = layer.lora_dropout["default"](torch.ones_like(x, dtype=a.dtype)) != 0
        dx, da, db = torch.autograd.grad(y, (x, a, b), inputs.dy)
        return LinearResult(y.detach(), dx, da, db, keep)


def _roundings(dtype: torch.dtype) -> Roundings:
    """A, B, the dropped x, S and dS in fp32; the base's output, the sum and dx in the working dtype."""
    wide = dict.fromkeys(("adapter", "dropped", "unscaled", "s", "ds", "sums"), torch.float32)
    return Roundings.everywhere(dtype, **wide)


def _layer(inputs: LinearInputs) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise BadSubject("--subject: verify.peft_subject needs PEFT: pip install peft") from error

    outer, inner = inputs.weight.shape
    base = nn.Linear(inner, outer, bias=inputs.bias is not None, device="meta")
    base.weight = nn.Parameter(inputs.weight.detach(), requires_grad=False)
    if inputs.bias is not None:
        base.bias = nn.Parameter(inputs.bias.detach(), requires_grad=False)
    config = peft.LoraConfig(
        r=inputs.rank, lora_alpha=inputs.alpha, use_rslora=inputs.rslora, lora_dropout=rate(inputs.dropout), target_modules=["proj"]
    )
    model = peft.get_peft_model(nn.Sequential(OrderedDict(proj=base)), config).train()
    layer = model.base_model.model.proj
    with torch.no_grad():
        layer.lora_A["default"].weight = nn.Parameter(inputs.a.detach().clone())
        layer.lora_B["default"].weight = nn.Parameter(inputs.b.detach().clone())
    return model


SUBJECT = Subject("PEFT", "cpu", PeftLinear(), TorchAdamW(), tags=(GRAD,))
CLAIMING_BITS = dataclasses.replace(SUBJECT, name="PEFT, claiming bits", linear=PeftLinear(bitwise_splits=True))
