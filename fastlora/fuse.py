"""Put the fused decoder layer in the place of a model's own layers, and take it out again.

:func:`fuse` changes the *class* of each decoder layer that its family's table row describes; modules, names and state dict stay. A
fused layer runs where there is an active stream (``fastlora.stream.use``) of tile-aligned documents; anywhere else, as in
generation with a cache, the layer's own forward runs. Each kind of layer is probed once against the model's own on random
input, and a kind that fails is refused by name: a new transformers release can cost speed, but no numbers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from fastlora import stream
from fastlora.errors import InputError
from fastlora.families import Layout, family_of
from fastlora.ops import attention, backend

PROBE_TOKENS = 128
# The fused layer may be this many times as far from the layer in fp32 as the model's own layer in its dtype.
PROBE_SLACK = 2.0

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class Fused:
    """What :func:`fuse` did.

    Attributes:
        layers: paths of the layers that are fused. refused: (path, reason) of those that are not.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put every layer's class and weights back; again does nothing."""
        while self._undo:
            self._undo.pop()()

    def line(self) -> str:
        """One line for the start of a run."""
        text = f"{len(self.layers)} decoder layers run as fused kernels"
        if self.refused:
            path, reason = self.refused[0]
            text += f"; {len(self.refused)} do not, first {path}: {reason}"
        return text


class _FusedLayer:
    """Put before a decoder layer's class."""

    def __call__(self, hidden_states: torch.Tensor, *args, **keywords):
        place = self._place(hidden_states, args, keywords)
        if place is None:
            return super().__call__(hidden_states, *args, **keywords)
        # past transformers' own checkpointing wrapper: what a fused layer keeps is its plan's to say
        return nn.Module.__call__(self, hidden_states, *args, fastlora_place=place, **keywords)

    def forward(self, hidden_states: torch.Tensor, *args, fastlora_place=None, **keywords) -> torch.Tensor:
        """hidden_states [1, T, features] -> the same shape; fused at the place that ``__call__`` found, the layer's own without."""
        if fastlora_place is None:
            return super().forward(hidden_states, *args, **keywords)
        from fastlora.ops.decoder_layer import decoder_layer

        plan = self._fastlora_plan
        plan.checkpoint = self._fastlora_checkpoint or (self.training and getattr(self, "gradient_checkpointing", False))
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        return decoder_layer(rows, plan, fastlora_place).view(hidden_states.shape)

    def _place(self, hidden: torch.Tensor, args: tuple, keywords: dict):
        """Where this call takes place; None where the layer's own forward must run."""
        from fastlora.ops.attention_triton import document_edges, fits
        from fastlora.ops.decoder_layer import Place
        from fastlora.ops.triton_path import chunks_here

        current, plan = stream.active(), self._fastlora_plan
        if current is None or hidden.dim() != 3 or hidden.shape[0] != 1 or current.total != hidden.shape[1]:
            return None
        if keywords.get("past_key_values") is not None or keywords.get("cache") is not None:
            return None
        if any(where.get(name) is not module for where, name, module in self._fastlora_at):
            return None  # ejected, or replaced since
        weight = plan.qkv.modules[0].weight
        usable = backend.pick(hidden) == "triton" and hidden.dtype == weight.dtype and hidden.device == weight.device
        if not usable or torch.is_autocast_enabled(hidden.device.type) or any(m.merged for g in plan.groups for m in g.adapted):
            return None
        if not fits(hidden, current.spans, plan.head_dim):
            return None
        embeddings = keywords.get("position_embeddings")
        if embeddings is None:
            bound = _signature(type(self).__mro__[2]).bind(self, hidden, *args, **keywords)
            embeddings = bound.arguments.get("position_embeddings")
        cos, sin = (None, None) if embeddings is None else (t.reshape(-1, t.shape[-1]) for t in embeddings)
        if plan.rope and (cos is None or cos.shape[0] != current.total):
            return None
        return Place(current, document_edges(current.spans, hidden.device), chunks_here(hidden[0]), cos, sin)


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)


@functools.cache
def _fused_class(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (_FusedLayer, cls), {"__module__": __name__})


def fuse(model: nn.Module, *, checkpoint_every: int = 0) -> Fused:
    """Fuse every decoder layer that can be, in place.

    Args:
        model: a transformers causal model on a GPU with frozen weights, with or without adapters.
        checkpoint_every: 0: every layer keeps its activations; n: every n-th layer keeps its input alone and runs again in
            the backward (1: all layers).

    Raises:
        ValueError: ``checkpoint_every`` below 0.
        InputError: the model's layers are fused already; two plans would each keep sums that the other does not see.
    """
    if checkpoint_every < 0:
        raise ValueError(f"checkpoint_every = {checkpoint_every}: allowed is 0 or more")
    again = next((path for path, layer in _layers(model) if isinstance(layer, _FusedLayer)), None)
    if again is not None:
        raise InputError(f"model: {again} is fused already; call undo() of what fused it (fuse or make_invariant) first")
    done, probed = Fused(), {}
    layout = family_of(model).layout
    for index, (path, layer) in enumerate(_layers(model)):
        if layout is None:
            done.refused.append((path, f"model type {getattr(model.config, 'model_type', '?')!r} has no fused layer"))
            continue
        reason = _why_not(layer, layout)
        plan = None if reason else _plan(layer, layout, model.config)
        if plan is not None:
            kind = _kind(layer, plan)
            if kind not in probed:
                probed[kind] = _probe(layer, plan, layout)
            reason = probed[kind]
        if reason:
            done.refused.append((path, reason))
            continue
        _swap(layer, plan, layout, done, checkpoint_every > 0 and index % checkpoint_every == 0)
        done.layers.append(path)
    return done


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]


def _swap(layer: nn.Module, plan, layout: Layout, done: Fused, checkpoint: bool) -> None:
    cls = type(layer)
    layer._fastlora_plan, layer._fastlora_checkpoint = plan, checkpoint
    layer._fastlora_at = [(owner._modules, name, getattr(owner, name)) for owner, name in _places(layer, layout)]
    layer.__class__ = _fused_class(cls)
    for group in plan.groups:
        group.attach()

    def undo() -> None:
        layer.__class__ = cls
        for group in plan.groups:
            group.undo()
        del layer._fastlora_plan, layer._fastlora_checkpoint, layer._fastlora_at

    done._undo.append(undo)


def _names(layer: nn.Module, layout: Layout) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """(owner, names) of each group of products."""
    own, mlp = layer.self_attn, layer.mlp
    return [(own, layout.qkv), (own, ("o_proj",)), (mlp, layout.gate_up), (mlp, ("down_proj",))]


def _places(layer: nn.Module, layout: Layout) -> list[tuple[nn.Module, str]]:
    return [(owner, name) for owner, names in _names(layer, layout) for name in names]


def _products(layer: nn.Module, layout: Layout) -> list[list[nn.Module]]:
    return [[getattr(owner, name) for name in names] for owner, names in _names(layer, layout)]


def _why_not(layer: nn.Module, layout: Layout) -> str:
    """Why this layer cannot be fused; empty if it can."""
    for group in _products(layer, layout):
        for module in group:
            if not isinstance(module, nn.Linear):
                return f"{type(module).__name__} is no linear layer"
            if module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad):
                return "a base weight is trained"
        if len({m.lora_dropout for m in group if hasattr(m, "lora_A")}) > 1:
            return "projections of one input have different dropout"
    weight = layer.self_attn.o_proj.weight
    if backend.pick(weight) != "triton":
        return backend.explain(weight.device, weight.dtype)[1]
    from fastlora.ops.attention_triton import fits_head  # imports Triton, absent on macOS and Windows

    if not fits_head(weight, layer.self_attn.head_dim):
        return f"heads of {layer.self_attn.head_dim} are wider than its attention kernel allows"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"weights are {weight.dtype}"
    return ""


def _plan(layer: nn.Module, layout: Layout, config):
    """The layer's plan, or None."""
    from fastlora.ops.decoder_layer import Norm, Plan
    from fastlora.ops.projections import Projections

    own = layer.self_attn

    def norm(module: nn.Module | None) -> Norm | None:
        if module is None:
            return None
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Norm(module.weight.detach(), eps, layout.norm_style)

    names = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    norms = {name: norm(getattr(layer, module) if module else None) for name, module in zip(names, layout.norms)}
    groups = [Projections(group) for group in _products(layer, layout)]
    d, width = own.head_dim, groups[0].features
    heads = groups[1].modules[0].in_features // d
    head_norms = None
    if hasattr(own, "q_norm"):
        head_norms = norm(own.q_norm), norm(own.k_norm)
    window = getattr(config, "sliding_window", None) if layout.window_of_config else getattr(own, "sliding_window", None)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    return Plan(
        *groups, **norms, heads=heads, key_heads=(width // d - heads) // 2, head_dim=d, scale=float(own.scaling),
        activation=ACTIVATIONS.get(activation, activation), head_norms=head_norms, rope=bool(getattr(own, "use_rope", True)),
        window=window, softcap=getattr(own, "attn_logit_softcapping", None),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
    )  # fmt: skip


def _kind(layer: nn.Module, plan) -> tuple:
    """Layers of one kind run the same code."""
    adapters = tuple((tuple(hasattr(m, "lora_A") for m in g.modules), g.features) for g in plan.groups)
    return type(layer), adapters, plan.rope, plan.window, plan.softcap, plan.head_norms is None, plan.heads, plan.head_dim


def _probe(layer: nn.Module, plan, layout: Layout) -> str:
    """Why the fused layer must not be used; empty if it agrees with the layer's own forward and backward on random input."""
    like = plan.qkv.modules[0].weight
    draw = torch.Generator().manual_seed(0)
    h, dy = (torch.randn(1, PROBE_TOKENS, like.shape[1], generator=draw).to(like.device, like.dtype) for _ in range(2))
    angle = torch.rand(1, PROBE_TOKENS, _rotary_width(layer, plan) // 2, generator=draw) * 6.28
    angle = torch.cat([angle, angle], -1).to(like.device)
    one = stream.Stream((PROBE_TOKENS,), PROBE_TOKENS, (0,))
    own = copy.deepcopy(layer).eval()
    # every attention kernel but this one needs a mask made for it
    own.self_attn.config._attn_implementation = attention.register()
    wide = copy.deepcopy(own).float()

    def run(which: nn.Module, dtype: torch.dtype):
        x = h.to(dtype).requires_grad_()
        around = backend.use("reference") if which is not layer else contextlib.nullcontext()
        # on this thread: the engine's own has no context for cuBLAS yet, and warns
        alone = torch.autograd.set_multithreading_enabled(False)
        with stream.use(one), around, torch.enable_grad(), alone:
            y = which(x, position_embeddings=(angle.cos().to(dtype), angle.sin().to(dtype)), attention_mask=None)
            y = y[0] if isinstance(y, tuple) else y
            (dx,) = torch.autograd.grad(y, (x,), dy.to(dtype))
        # what the layer adds; the residual itself would hide an error
        return [(y - x).detach().double(), (dx - dy.to(dtype)).double()]

    try:
        exact, eager = run(wide, torch.float32), run(own, like.dtype)
        done, training = Fused(), layer.training
        _swap(layer, plan, layout, done, False)
        try:
            layer.eval()
            fused = run(layer, like.dtype)
        finally:
            layer.train(training)
            done.undo()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        return f"its probe raised {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    terms = sum(g.modules[0].in_features for g in plan.groups) + plan.head_dim + PROBE_TOKENS
    for name, e, w, f in zip(("output", "gradient"), eager, exact, fused):
        # in fp32 the model's own layer is the reference: allow a rounding for each term of each sum, and one of the residual sum
        of_residual = float((h if name == "output" else dy).detach().double().norm())
        floor = 2.0**-24 * (terms * float(w.norm()) + of_residual) if like.dtype == torch.float32 else 0.0
        own_error, error = float((e - w).norm()), float((f - w).norm())
        if not error <= PROBE_SLACK * own_error + floor:
            return f"its probe's {name} is {error:.3g} from the layer in fp32, the model's own {own_error:.3g}"
    return ""


def _rotary_width(layer: nn.Module, plan) -> int:
    factor = getattr(layer.self_attn.config, "partial_rotary_factor", None)
    parameters = getattr(layer.self_attn.config, "rope_parameters", None) or {}
    factor = parameters.get("partial_rotary_factor", factor) or 1.0
    return int(plan.head_dim * factor)
