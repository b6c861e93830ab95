"""Make the frozen part of a model compute each document by itself, bit for bit, and undo that afterwards.

Row-wise operations (embedding, norms, rotary positions, activations, residuals) are the model's own. What looks across rows
is replaced for the time of a run: linear layers by fixed blocks of rows, attention by one document at a time. What cannot be
made independent of the split is listed by name, so that nothing is claimed for it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastlora.errors import InputError
from fastlora.families import FAMILIES, batch_dependent_rope
from fastlora.modules import LoraLinear
from fastlora.ops import attention
from fastlora.ops.frozen_linear import frozen_linear


class FrozenLinear(nn.Linear):
    """A frozen linear layer over fixed blocks of rows; shares the weight and bias of the layer it stands for."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)

    def forward(self, x):
        return frozen_linear(x, self.weight, self.bias)


class Invariant:
    """What :func:`make_invariant` changed.

    Attributes:
        not_exact: (module, reason) of everything whose bits may depend on the split; empty: exactness is claimed.
    """

    def __init__(self) -> None:
        self.not_exact: list[tuple[str, str]] = []
        self._undo: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put everything back, in the reverse order. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def make_invariant(model: nn.Module) -> Invariant:
    """Swap in what computes a document by itself; the caller calls ``undo()`` on the result.

    Args:
        model: a transformers causal model, injected or not, its base frozen.

    Raises:
        InputError: a dropout of the base model is above 0, by module name: torch's dropout draws by place in the batch.
    """
    _refuse_dropout(model)
    done = Invariant()
    model_type = getattr(model.config, "model_type", None)
    if model_type not in FAMILIES:
        done.not_exact.append(("model", f"model type {model_type!r} is not in the table of families"))
    rope = batch_dependent_rope(model)
    if rope is not None:
        done.not_exact.append(("rotary embedding", rope))
    _swap_linears(model, done)
    _swap_attention(model, done)
    return done


def _refuse_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InputError(f"{path}: dropout of the base model is {module.p}; allowed is 0 (set it in the model's config)")
        rate = getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise InputError(f"{path}.attention_dropout = {rate}; allowed is 0 (set it in the model's config)")


def _swap_linears(model: nn.Module, done: Invariant) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear | FrozenLinear) or child is head or not isinstance(child, nn.Linear):
                continue
            place = f"{path}.{name}" if path else name
            if type(child) is not nn.Linear:
                done.not_exact.append((place, f"a {type(child).__name__} computes its rows in its own way"))
            elif child.weight.requires_grad:
                done.not_exact.append((place, "its weight is trained, which sums over tokens by torch"))
            else:
                setattr(module, name, FrozenLinear(child))
                done._undo.append(lambda m=module, n=name, c=child: setattr(m, n, c))


def _swap_attention(model: nn.Module, done: Invariant) -> None:
    before = getattr(model.config, "_attn_implementation", None)
    name = attention.register()
    try:
        model.set_attn_implementation(name)
    except (AttributeError, ValueError) as error:
        done.not_exact.append(("attention", f"it cannot be replaced ({error})"))
        return
    if model.config._attn_implementation != name:
        done.not_exact.append(("attention", f"the model keeps its own ({model.config._attn_implementation})"))
    done._undo.append(lambda: model.set_attn_implementation(before))
