"""LoraLinear: a frozen linear layer with a low-rank adapter beside it."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastlora.errors import InputError
from fastlora.ops.dropout import DropoutKey, module_key
from fastlora.ops.head_lora import HeadLora
from fastlora.ops.lora_linear import lora_linear
from fastlora.stream import active


class Factor(nn.Module):
    """One factor of the adapter: a single fp32 parameter ``weight``.

    It is a module so that state-dict names are PEFT's (``<path>.lora_A.weight``), and no nn.Linear
    so that nothing that looks for linear layers takes it for one. The parameter is the fp32 master
    copy: ``model.bfloat16()`` and ``model.to(dtype)`` move it but leave its type alone, because
    updates of a 16-bit copy round to nothing.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        def keep_fp32(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_fp32, recurse)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


@torch.no_grad()
def draw(lora_a: Factor, lora_b: Factor, rank: int, init: bool | str, generator: torch.Generator) -> None:
    """Draw A (and with ``init=False`` B) on the CPU from ``generator``; PEFT's distributions.

    True: A Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(K), 1/sqrt(K)), B zero.
        "gaussian": A normal with standard deviation 1/rank, B zero. False: A and B both
        Kaiming-uniform.
    """
    a = torch.empty(lora_a.weight.shape, dtype=torch.float32)
    b = torch.zeros(lora_b.weight.shape, dtype=torch.float32)
    if init == "gaussian":
        a.normal_(std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
    lora_a.weight.copy_(a)
    lora_b.weight.copy_(b)


class LoraLinear(nn.Linear):
    """Y = x W^T + scaling * D(x) A^T B^T + bias, with W and bias frozen and A, B fp32 parameters.

    Takes the place of an ``nn.Linear`` and shares its very parameter objects, so the base's
    state-dict names and bytes stay as they are. Source: Hu et al. 2021; dropout has PEFT's meaning
    (on the adapter's input only, an independent mask for each projection).

    Attributes:
        weight [N, K], bias [N] or None: the base layer's parameters. lora_A.weight [r, K],
        lora_B.weight [N, r]: fp32. scaling: float, alpha / r or alpha / sqrt(r). lora_dropout:
        float, as in LoraConfig; acts in training mode only. path: the module's path in the model; names the
        module in errors and seeds its dropout. exact, sums: set by ``fastlora.exact``: gradients of
        A and B go into the integer sums instead of ``.grad``. merged: the weight already holds the
        adapter (see ``fastlora.merge``), forward is the plain linear layer.
    """

    def __init__(
        self, base: nn.Linear, path: str, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.lora_A = Factor(rank, base.in_features, base.weight.device)
        self.lora_B = Factor(base.out_features, rank, base.weight.device)
        self.scaling = scaling
        self.lora_dropout = dropout
        self.path = path
        # For dropout without a stream: other projections of the same layer draw other masks.
        self._plain_seed = module_key(0, 0, path)
        self.exact = False
        self.sums = None
        # Where the sums come from when several layers share a buffer (fastlora.fuse); None: made by fastlora.exact.
        self.sums_from = None
        self.merged = False
        # What merge() keeps to restore the base: a plain attribute, so that no state dict holds it.
        self.kept_base: torch.Tensor | None = None
        # In a tuple: a registered submodule would show the base's parameters a second time.
        self._base = (base,)
        self.train(base.training)

    @property
    def rank(self) -> int:
        """The rank r of the adapter."""
        return self.lora_A.weight.shape[0]

    def reset(self, init: bool | str, generator: torch.Generator) -> None:
        """Draw A (and with ``init=False`` B); see :func:`draw`."""
        draw(self.lora_A, self.lora_B, self.rank, init, generator)

    def products(self, weight: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """``[(weight [N, K], A [r, K], B [N, r])]``: the one product there is, with a weight of the layer's shape."""
        return [(weight, self.lora_A.weight, self.lora_B.weight)]

    @property
    def target(self) -> str:
        """What the configuration's patterns are matched with."""
        return self.path

    @property
    def weight_name(self) -> str:
        """The base weight's name in the model."""
        return f"{self.path}.weight"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] in the weight's dtype -> [..., N] in the same; under autocast both are cast
        first."""
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._call(x, self.weight, self.bias)
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        # Off inside: the operation accumulates in fp32, which autocast would turn into 16 bits.
        with torch.autocast(kind, enabled=False):
            return self._call(x.to(dtype), self.weight.to(dtype), bias)

    def _call(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dropout = self.lora_dropout if self.training else 0.0
        return lora_linear(
            x,
            weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            bias,
            dropout=dropout,
            key=self._dropout_key(x) if dropout else None,
            sums=self.sums if self.exact else None,
        )

    def in_loss(
        self, hidden: torch.Tensor, weights: torch.Tensor | None = None, gradient_scale: float = 1.0
    ) -> HeadLora | None:
        """What this layer, as the head, adds to the fused loss of ``hidden`` [M, K]; None: nothing, it
        is merged.

        See :class:`fastlora.ops.head_lora.HeadLora` for the weights and the scale.
        """
        if self.merged:
            return None
        dropout = self.lora_dropout if self.training else 0.0
        return HeadLora(
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            dropout,
            self._dropout_key(hidden) if dropout else None,
            self.sums if self.exact else None,
            weights,
            gradient_scale,
        )

    def _dropout_key(self, x: torch.Tensor) -> DropoutKey:
        rows = x.numel() // self.in_features
        stream = active()
        if stream is None:
            # Drawn from torch's own CPU generator: checkpointing restores its state, so a
            # recomputed layer gets the same mask. It stays a tensor: torch.compile traces it, and
            # no GPU waits for it.
            start = torch.randint(0, 2**62, (), dtype=torch.int64).to(x.device)
            tokens = start + torch.arange(rows, dtype=torch.int64, device=x.device)
            return DropoutKey(self._plain_seed, tokens)
        if rows != stream.total:
            raise InputError(
                f"{self.path}: the input has {rows} rows, allowed are the {stream.total} of the "
                "active stream "
                "(dropout needs every row's sample id)"
            )
        return DropoutKey(
            module_key(stream.seed, stream.step, self.path), stream.token_keys(x.device)
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.rank}, scaling={self.scaling:g}, "
            f"dropout={self.lora_dropout:g}" + (", merged" if self.merged else "")
        )
