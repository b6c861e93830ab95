"""Systems to compare with: PEFT, Liger's kernels, torch.compile. Each is optional and kept out of every other system's way."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import nn

from fastlora.config import SEVEN
from fastlora.errors import InputError

FLASH = "flash_attn"


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, system: str) -> None:
    """Raise an InputError that names what is missing.

    Raises:
        InputError: the package is not installed.
    """
    if not installed(package):
        raise InputError(f"{system}: {package} is not installed; it is optional, pip install it to have this system timed")


def random_b(model: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Give every B random values: zeros would leave half of the adapter's products without work for the arithmetic units."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device) * (0.1 / rank**0.5)
                parameter.copy_(drawn)


def add_peft(model: nn.Module, rank: int, dropout: float, *, fp32: bool = False) -> nn.Module:
    """PEFT's adapters on all seven projections, in the base's dtype (its fastest setting), or with ``fp32`` as its default makes them.

    Raises:
        InputError: PEFT is not installed.
    """
    require("peft", "peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(SEVEN), bias="none")
    base = next(model.parameters())
    model = get_peft_model(model, config, autocast_adapter_dtype=fp32).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if fp32 else base.dtype)
    random_b(model, rank, torch.Generator(base.device).manual_seed(2))
    return model


class Patched:
    """Liger's kernels in one model.

    Its patch also changes names in transformers' module, which every other model of the process reads. They are put back at once,
    and stand only while a call of this system runs: :meth:`active`.
    """

    def __init__(self, model: nn.Module) -> None:
        require("liger_kernel", "liger")
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        self._module = modeling_llama
        before = dict(vars(modeling_llama))
        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True, model=model
        )
        after = dict(vars(modeling_llama))
        self._own = {name: value for name, value in after.items() if name in before and before[name] is not value}
        self._plain = {name: before[name] for name in self._own}
        self._set(self._plain)

    def _set(self, names: dict) -> None:
        for name, value in names.items():
            setattr(self._module, name, value)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The patched names, for the length of the block."""
        self._set(self._own)
        try:
            yield
        finally:
            self._set(self._plain)


def compiled(model: nn.Module) -> nn.Module:
    """The model under torch.compile, its graph whole; what was compiled for others is dropped first."""
    torch._dynamo.reset()
    return torch.compile(model)


def compile_layers(model: nn.Module) -> nn.Module:
    """Each decoder layer under torch.compile by itself: one compilation for all of them, in seconds instead of minutes."""
    torch._dynamo.reset()
    for module in model.modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp"):
            module.compile()
    return model


def liger_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Liger's RMSNorm."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps)


def liger_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Liger's RoPE on [1, heads, T, head_dim]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_rotary_pos_emb(q, k, cos, sin)


def liger_glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Liger's SwiGLU gate."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, summed."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)
