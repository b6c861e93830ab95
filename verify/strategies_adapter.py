"""Adapters nobody chose by hand: targets, ranks, alphas and patterns, for the claim ``parity``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from verify.oracle.linear import scale_of
from verify.subject import TrainCase
from verify.tiny import VOCABULARY, tiny_llama


@dataclass(frozen=True)
class AdapterCase:
    """An adapter on a tiny Llama, in PEFT's terms; patterns map the end of a module's path to its own rank or alpha."""

    r: int
    alpha: int
    rslora: bool
    targets: tuple[str, ...]
    ranks: tuple[tuple[str, int], ...]
    alphas: tuple[tuple[str, int], ...]
    seed: int

    def config(self) -> dict:
        """Fields of PEFT's ``LoraConfig``."""
        return {
            "r": self.r, "lora_alpha": self.alpha, "use_rslora": self.rslora, "target_modules": list(self.targets),
            "rank_pattern": self._matching(self.ranks), "alpha_pattern": self._matching(self.alphas),
        }  # fmt: skip

    def _matching(self, patterns: tuple[tuple[str, int], ...]) -> dict[str, int]:
        """Patterns of modules that are targets; another would be a slip of the user's, which may be refused."""
        return {key: value for key, value in patterns if key.rpartition(".")[2] in self.targets}

    def scale(self, path: str) -> float:
        """The factor of the module at ``path``: the first pattern that is the end of the path counts."""

        def own(patterns: tuple[tuple[str, int], ...], default: int) -> int:
            return next((v for key, v in patterns if path == key or path.endswith(f".{key}")), default)

        return scale_of(own(self.alphas, self.alpha), own(self.ranks, self.r), self.rslora)

    def model(self) -> torch.nn.Module:
        """The bare model, the same at every call."""
        return tiny_llama(TrainCase(lengths=(1,), hidden=16, seed=self.seed))

    def tokens(self) -> torch.Tensor:
        """Token ids [1, 3]."""
        return torch.randint(2, VOCABULARY, (1, 3), generator=torch.Generator().manual_seed(self.seed))


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_cases() -> st.SearchStrategy[AdapterCase]:
    """One to seven targets; patterns for some, in both layers or in one."""
    names = st.lists(st.sampled_from(MODULES), min_size=1, max_size=7, unique=True).map(tuple)
    keys = st.sampled_from((*MODULES, "layers.1.mlp.down_proj", "layers.0.self_attn.q_proj", "self_attn.v_proj"))

    def pattern(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple]:
        return st.lists(st.tuples(keys, values), max_size=2, unique_by=lambda pair: pair[0]).map(tuple)

    return st.builds(
        AdapterCase,
        r=st.sampled_from((1, 2, 3, 4, 8)),
        alpha=st.sampled_from((1, 3, 8, 16)),
        rslora=st.booleans(),
        targets=names,
        ranks=pattern(st.sampled_from((1, 3, 5, 7))),
        alphas=pattern(st.sampled_from((2, 5, 20))),
        seed=st.integers(0, 2**31 - 1),
    )
