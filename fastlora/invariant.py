"""Make a whole model independent of the split: every product and reduction in fixed blocks.

:func:`make_invariant` changes the *class* of modules in place (parameters, names, hooks and copies
stay as they are) and the attention implementation; ``undo`` puts both back. Frozen linear layers
run over fixed tiles, attention runs a document at a time, RMSNorms and gates of known shape run
over fixed tiles on all threads after a probe showed their bits equal to the model's own; on a GPU
they run by the library's kernels, after a probe showed them equal to within a rounding. What is
left (embedding, RoPE, residual sums) is row-wise and exact: on CPU on one thread
(``blocks.single_thread``), on a GPU because each element is computed from itself alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import nn

from fastlora import blocks, stream
from fastlora.errors import InputError
from fastlora.experts import LoraExperts
from fastlora.families import batch_dependent_rope, family_of
from fastlora.fuse import Fused, fuse
from fastlora.ops import attention, glu, rms_norm
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.reference import ALIGN_BYTES
from fastlora.recompute import check_every, recompute_layers

_PROBE_ROWS = 16
_ABSENT = object()
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Fields about layers that training a causal model never runs.
_OTHER_DROPOUTS = ("classifier_dropout", "summary_first_dropout", "attention_dropout")


class FrozenLinear(nn.Linear):
    """nn.Linear over fixed tiles, with a gradient for its input only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        return frozen_linear(x, self.weight, self.bias)


class _TiledNorm:
    """Put before an RMSNorm's class: the same norm over fixed tiles."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm.rms_norm(x, self.weight, _eps(self), self._tiled_style)


class _TiledRows:
    """Put before a router's or experts' class: its forward one fixed tile after the other.

    Which tokens of a tile go to an expert is a matter of the tile alone, so every product inside has one shape and one
    content wherever the document lies.
    """

    def forward(self, *rows: torch.Tensor):
        sizes = [stop - start for start, stop in stream.tiles(rows[0].shape[0])]
        parts = [super(_TiledRows, self).forward(*part) for part in zip(*(t.split(sizes) for t in rows))]
        return tuple(map(torch.cat, zip(*parts))) if isinstance(parts[0], tuple) else torch.cat(parts)


class _TiledGate:
    """Put before a gated feed-forward layer's class: the same layer, its gate over fixed tiles."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = glu.glu(self.gate_proj(x), self.up_proj(x), self._tiled_activation)
        return self.down_proj(hidden)


@functools.cache
def _before(mixin: type, cls: type, **attributes: str) -> type:
    """A class that is ``cls`` with the mixin's forward."""
    return type(f"Tiled{cls.__name__}", (mixin, cls), {"__module__": __name__, **attributes})


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class Invariant:
    """What :func:`make_invariant` did.

    Attributes:
        not_exact: (module path, reason) of everything for which exactness is not claimed.
        fused: what :func:`fastlora.fuse.fuse` did on a GPU, else None.
        recomputed: layers that are not fused and run again in the backward.
    """

    def __init__(self) -> None:
        self.not_exact: list[tuple[str, str]] = []
        self.fused: Fused | None = None
        self.recomputed = 0
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put every class, dropout and the attention implementation back; again does nothing."""
        while self._undo:
            self._undo.pop()()

    def set(self, target: object, name: str, value: object) -> None:
        """Set an attribute and remember the old value."""
        before = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, before))
        setattr(target, name, value)

    def put(self, target: object, name: str, value: object) -> None:
        """:meth:`set` for an attribute of the object itself, which it may lack."""
        before = vars(target).get(name, _ABSENT)
        self._undo.append(lambda: delattr(target, name) if before is _ABSENT else setattr(target, name, before))
        setattr(target, name, value)


def make_invariant(model: nn.Module, *, checkpoint_every: int = 0) -> Invariant:
    """Change a transformers causal model, in place, so that its bits do not depend on the split.

    ``not_exact`` names what stays as it was though the split may change its bits. On CPU frozen
    parameters that do not begin at a 64-byte line are moved to one (same bytes).

    Args:
        checkpoint_every: 0: layers keep their activations; n: every n-th keeps its input alone and
            runs again in the backward. Above 1 only where all layers are fused (on a GPU).

    Raises:
        InputError: layers that look across documents (convolutions, state space layers, chunked
            attention), a dropout that cannot be turned off, a model without transformers'
            attention interface, or a ``checkpoint_every`` its layers do not take. The model is
            then unchanged.
    """
    check_every(checkpoint_every)
    done = Invariant()
    try:
        _refuse_layers(model)
        _no_dropout(model, done)
        _set_attention(model, done)
        _note_rope(model, done)
        devices = sorted({p.device.type for p in model.parameters()})
        if devices == ["cpu"]:
            _align(model)
            _tile_experts(model, done)
        else:
            # before its modules are swapped: the probe compares with the model's own
            done.fused = fuse(model, checkpoint_every=checkpoint_every)
            done._undo.append(done.fused.undo)
        done.recomputed = recompute_layers(model, done, checkpoint_every, done.fused.layers if done.fused else ())
        _swap_modules(model, done, devices)
    except BaseException:
        done.undo()
        raise
    return done


def _refuse_layers(model: nn.Module) -> None:
    if getattr(model.config, "router_jitter_noise", 0.0):
        raise InputError(f"config.router_jitter_noise is {model.config.router_jitter_noise}; set it to 0 (noise of torch's own "
                         "is not exact)")
    for kind in getattr(model.config, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise InputError(
                f"layer type {kind!r}: it would look across the documents of a stream; "
                f"allowed are {', '.join(_LAYER_TYPES)}"
            )
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.RNNBase)):
            raise InputError(
                f"{path} ({type(module).__name__}): it would look across the documents of a stream"
            )


def _no_dropout(model: nn.Module, done: Invariant) -> None:
    """Turn the base model's own dropouts off; LoRA's is made by the library and stays."""
    turned = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            turned.add(module.p)
            done.set(module, "p", 0.0)
        if isinstance(getattr(module, "attention_dropout", None), float):
            done.set(module, "attention_dropout", 0.0)
    for name, value in model.config.to_dict().items():
        is_rate = "drop" in name and isinstance(value, (int, float)) and value > 0
        if is_rate and name not in _OTHER_DROPOUTS and value not in turned:
            raise InputError(
                f"config.{name} is {value}; set it to 0 (torch's dropout is not exact)"
            )


def _set_attention(model: nn.Module, done: Invariant) -> None:
    name = attention.register()
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        kind = type(model).__name__
        raise InputError(f"{kind} does not take an attention implementation: {error}") from error
    done._undo.append(lambda: model.set_attn_implementation(before))


def _note_rope(model: nn.Module, done: Invariant) -> None:
    reason = batch_dependent_rope(model)
    if reason:
        done.not_exact.append(("rotary_emb", reason))


def _align(model: nn.Module) -> None:
    """Products take another path for weights that begin elsewhere, as memory-mapped ones may."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.data_ptr() % ALIGN_BYTES:
            parameter.data = parameter.data.clone()


def _tile_experts(model: nn.Module, done: Invariant) -> None:
    """Routers and experts of a known family, on the CPU; grouped products of all experts give way to one expert at a time."""
    names = family_of(model).by_token
    if names and hasattr(model, "set_experts_implementation"):
        before = model.config._experts_implementation
        model.set_experts_implementation("eager")
        done._undo.append(lambda: model.set_experts_implementation(before))
    for module in model.modules():
        known = type(module).__name__ in names or isinstance(module, LoraExperts)
        if known and not any(p.requires_grad for p in module.parameters(recurse=False)):
            done.set(module, "__class__", _before(_TiledRows, type(module)))


def _swap_modules(model: nn.Module, done: Invariant, devices: list[str]) -> None:
    head, norms = model.get_output_embeddings(), []
    for path, module in model.named_modules():
        if module is head or isinstance(module, (nn.Embedding, _TiledRows)):
            continue
        own, kind = list(module.parameters(recurse=False)), type(module).__name__
        if type(module) is nn.Linear:
            if any(p.requires_grad for p in own):
                done.not_exact.append((path, "its weight is trained, not frozen"))
            else:
                done.set(module, "__class__", FrozenLinear)
        elif kind.endswith("Norm"):
            if any(p.requires_grad for p in own):
                done.not_exact.append((path, "its weight is trained, not frozen"))
            elif not (kind.endswith("RMSNorm") and _swap_norm(module, own, done)):
                norms.append(path)  # row-wise on one thread of a CPU: exact, only slower
        elif all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            _swap_gate(module, done)
        elif own and (isinstance(module, LoraExperts) or not (hasattr(module, "lora_A") or kind == "Factor")):
            if any(p.requires_grad for p in own):
                done.not_exact.append((path, "its parameters are trained, not frozen"))
            else:
                done.not_exact.append((path, f"{kind}: its products do not run in fixed blocks"))
    if norms and devices != ["cpu"]:
        reason = f"torch's reduction on {', '.join(devices)} may depend on the number of rows"
        done.not_exact.append((f"{len(norms)} norms, first {norms[0]}", reason))


def _distance(own: torch.Tensor, ours: torch.Tensor) -> float | None:
    """How far a result is from the model's own: 0 for equal bits, None if it may not stand in for it.

    On CPU only equal bits may. Elsewhere sums run in another order: each of two roundings (of the normalised row or the
    activation, and of the product) may fall to the other side, and fp32 steps lose some units of their own.
    """
    if torch.equal(own, ours):
        return 0.0
    if own.device.type == "cpu":
        return None
    info, wanted = torch.finfo(own.dtype), own.double()
    gap, size = (wanted - ours.double()).abs(), wanted.abs()
    allowed = 2 * info.eps * size + 2.0**-19 * (size + size.max()) + 4 * info.tiny * info.eps
    return gap.sum().item() if bool((gap <= allowed).all()) else None


def _nearest(own: torch.Tensor, names: tuple[str, ...], result: Callable[[str], torch.Tensor]) -> str | None:
    """The name whose ``result`` is nearest to the model's own, of those that may stand in for it."""
    best, least = None, float("inf")
    for name in names:
        distance = _distance(own, result(name))
        if distance is not None and distance < least:
            best, least = name, distance
        if least == 0.0:
            break
    return best


@torch.no_grad()
def _swap_norm(module: nn.Module, own: list, done: Invariant) -> bool:
    """Swap when the norm's result on a probe is that of a style; whether it was."""
    if len(own) != 1 or _eps(module) is None:
        return False
    cls, weight = type(module), own[0]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, _PROBE_ROWS, weight.shape[0], generator=generator).to(weight.device, weight.dtype)

    def ours(style: str) -> torch.Tensor:
        module.__class__ = _before(_TiledNorm, cls, _tiled_style=style)
        try:
            return module(probe)
        finally:
            module.__class__ = cls

    with blocks.single_thread():
        style = _nearest(module(probe), rms_norm.STYLES, ours)
    if style is not None:
        done.set(module, "__class__", _before(_TiledNorm, cls, _tiled_style=style))
    return style is not None


@torch.no_grad()
def _swap_gate(module: nn.Module, done: Invariant) -> None:
    """Swap when the class's own forward is ours, compared with simple maps as projections."""
    probe = torch.randn(_PROBE_ROWS, 64, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(module.parameters(), probe).device)
    double = types.SimpleNamespace(act_fn=module.act_fn)
    for name, factor in {"gate_proj": 0.5, "up_proj": 1.5, "down_proj": 0.75}.items():
        setattr(double, name, functools.partial(torch.mul, factor))

    def ours(activation: str) -> torch.Tensor:
        double._tiled_activation = activation
        return _TiledGate.forward(double, probe)

    with blocks.single_thread():
        try:
            own = type(module).forward(double, probe)
        except AttributeError:
            return  # another kind of layer with the same names: left as it is
        activation = _nearest(own, tuple(glu.ACTIVATIONS), ours)
    if activation is not None:
        done.set(module, "__class__", _before(_TiledGate, type(module), _tiled_activation=activation))
