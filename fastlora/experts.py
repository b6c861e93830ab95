"""LoRA on the experts of a mixture: each expert's own low-rank product on the tokens that went to it.

    y = x W_e^T + s (x A_e^T) B_e^T       x [tokens of expert e, K], W_e [N, K], A_e [r, K], B_e [N, r]

The frozen W of all E experts are one parameter [E, N, K]. A and B of all of them are PEFT's two tensors (its ``ParamWrapper``):
A [E r, K] holds the experts one after another, in B [N, r E] the expert is the fast index of a column. Each product is the LoRA
linear (fastlora/ops/lora_linear.py), so rounding, gradients and exact sums are those of any other layer. The loop over experts is
transformers' eager one (``Qwen3MoeExperts``, ``MixtralExperts``), order of rows and sums included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastlora.modules import Factor, draw
from fastlora.ops.lora_linear import lora_linear
from fastlora.token_sum import SumSlice


def adapter_paths(path: str, parameters: Sequence[str]) -> dict[str, str]:
    """Where the adapters of some parameters of the module at ``path`` stand, outermost first.

    PEFT nests them: the last of the module's parameters has the module's own path, each before it one more ``base_layer``.
    """
    return {name: path + ".base_layer" * depth for depth, name in enumerate(reversed(parameters))}


def factor_shapes(weight: torch.Tensor, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B for expert weights [E, N, K]: [E r, K] and [N, r E]."""
    count, rows, columns = weight.shape
    return (count * rank, columns), (rows, rank * count)


class ExpertLora(nn.Module):
    """A and B of every expert for one parameter of three dimensions.

    Attributes:
        lora_A.weight [E r, K], lora_B.weight [N, r E]: fp32. scaling: alpha / r or alpha / sqrt(r).
        parameter: the name of the adapted parameter in its module of experts.
        path: where this adapter stands in the model, see :func:`adapter_paths`; the names of state dicts, digests and files
            are PEFT's by it. target: the parameter's own path.
        exact, sums, sums_from, merged, kept_base: as in :class:`fastlora.modules.LoraLinear`; the sums have the shapes of A and B.
    """

    def __init__(self, weight: nn.Parameter, path: str, target: str, rank: int, scaling: float) -> None:
        nn.Module.__init__(self)
        self.parameter = target.rpartition(".")[2]
        self.path, self.target, self.rank, self.scaling = path, target, rank, scaling
        shapes = factor_shapes(weight, rank)
        self.lora_A, self.lora_B = (Factor(*shape, weight.device) for shape in shapes)
        self.sums = self.sums_from = self.kept_base = None
        self.exact = self.merged = False
        # The module with the weights, in a tuple: registered, it would stand inside itself. Set by LoraExperts.
        self._holder: tuple[nn.Module, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weights [E, N, K]."""
        return getattr(self._holder[0], self.parameter)

    @property
    def weight_name(self) -> str:
        """The base weight's name in the model."""
        return self.target

    def reset(self, init: bool | str, generator: torch.Generator) -> None:
        """Draw A (and with ``init=False`` B); see :func:`fastlora.modules.draw`."""
        draw(self.lora_A, self.lora_B, self.rank, init, generator)

    def products(self, weight: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """``(weight [N, K], A [r, K], B [N, r])`` of every expert, as views; ``weight`` has the shape [E, N, K]."""
        return list(
            zip(weight.unbind(0), self._of_a(self.lora_A.weight).unbind(0), self._of_b(self.lora_B.weight).unbind(2))
        )

    def _of_a(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self.rank, tensor.shape[1])  # [E, r, K]

    def _of_b(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(tensor.shape[0], self.rank, -1)  # [N, r, E]

    def sums_of(self, expert: int) -> tuple[SumSlice, SumSlice] | None:
        """Where the exact sums of one expert's dA and dB go; None outside exact mode."""
        if not self.exact:
            return None
        a, b = self.sums
        of_a = SumSlice(a, lambda total: self._of_a(total)[expert])
        return of_a, SumSlice(b, lambda total: self._of_b(total)[..., expert])

    def extra_repr(self) -> str:
        return f"{self.parameter}, r={self.rank}, scaling={self.scaling:g}" + (", merged" if self.merged else "")


class LoraExperts(ExpertLora):
    """Takes the place of a module of experts that has ``gate_up_proj`` [E, 2 I, H] and ``down_proj`` [E, H, I].

    It shares that module's very parameter objects and its activation. It is itself the adapter of the last adapted parameter; the
    others' are inside it.

    Args:
        base: the module. path: where it stands. adapted: (rank, scaling) of the adapted parameters by name, in the module's order.
    """

    def __init__(self, base: nn.Module, path: str, adapted: dict[str, tuple[int, float]]) -> None:
        (own, _), *inner = adapter_paths(path, list(adapted)).items()
        super().__init__(getattr(base, own), path, f"{path}.{own}", *adapted[own])
        self.gate_up_proj, self.down_proj, self.act_fn = base.gate_up_proj, base.down_proj, base.act_fn
        self.adapters: tuple[ExpertLora, ...] = (self,)
        for name, place in inner:
            adapter = ExpertLora(getattr(base, name), place, f"{path}.{name}", *adapted[name])
            self.adapters[-1].base_layer = adapter
            self.adapters += (adapter,)
        for adapter in self.adapters:
            adapter._holder = (self,)
        # In a tuple: a registered submodule would show the base's parameters a second time.
        self._base = (base,)
        self.train(base.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], the k experts of each token [T, k] and their weights [T, k] -> [T, H].

        An index beyond the experts (a token that is another process's) adds nothing.
        """
        out = torch.zeros_like(hidden_states)
        up_of, down_of = self._product("gate_up_proj"), self._product("down_proj")
        by_place = top_k_index.T
        for expert in top_k_index.unique().tolist():
            if expert >= len(self.gate_up_proj):
                continue
            place, token = torch.where(by_place == expert)
            gate, up = up_of(hidden_states[token], expert).chunk(2, dim=-1)
            y = down_of(self.act_fn(gate) * up, expert) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _product(self, name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """``(x [M, K], expert) -> [M, N]`` of one of the two parameters."""
        weight = getattr(self, name)
        adapter = next((a for a in self.adapters if a.parameter == name and not a.merged), None)
        if adapter is None:
            return lambda x, expert: nn.functional.linear(x, weight[expert])
        products = adapter.products(weight)
        return lambda x, expert: lora_linear(x, *products[expert], adapter.scaling, sums=adapter.sums_of(expert))
