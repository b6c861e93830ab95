"""A whole decoder layer as one autograd operation over one stream of tokens.

    x  = norm1(h)                      q, k, v = rope(W_qkv x)         o = attention(q, k, v)
    h1 = h + m post1(W_o o)            x2 = norm2(h1)                  h2 = h1 + m post2(W_down (act(gate) * up))

Every product is a group of projections with their adapters (ops/projections.py), every other kernel works row by row or document by
document, so the layer's bits do not depend on what else is in the stream. Kept for the backward: h, the rotated q, k and v, o, h1,
gate and up, and the low-rank S. Norms of queries and keys keep their statistics and the product before them (v is a part of it), post1
and post2 the products that they read. Computed again: the outputs of norm1, norm2 and the gate. Under checkpointing only h is kept.

Source of what is kept and what is not: Chen et al., "Training deep nets with sublinear memory cost" (2016); Hsu et al., "Liger kernel"
(2024).
"""

from __future__ import annotations

import dataclasses

import torch

from fastlora.errors import TrainingError
from fastlora.kernels.attention import attention_backward, attention_forward
from fastlora.kernels.chunks import Chunks
from fastlora.kernels.edges import Edges
from fastlora.kernels.rms_norm import norm_backward, norm_forward
from fastlora.kernels.rope import head_norm_rotate, head_norm_rotate_backward, rotate
from fastlora.ops.beside import Beside, Later
from fastlora.ops.gated import gated_backward, gated_forward
from fastlora.ops.projections import Projections
from fastlora.stream import Stream


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight [features], eps, and where it rounds (a style of ops/rms_norm.py)."""

    weight: torch.Tensor
    eps: float
    style: str


@dataclasses.dataclass
class Plan:
    """What a layer is made of.

    Attributes:
        qkv, o, gate_up, down: its products.
        before_attention, after_attention, before_mlp, after_mlp: its norms; None where the family has none.
        head_norms: (of queries, of keys), or None; of each head where their weights are [head_dim], else (OLMo 2) of all heads
            at once. heads, key_heads, head_dim: sizes. rope: False for a layer without RoPE.
        scale, window, softcap: of attention. activation: of the gate. residual: m above.
        checkpoint: keep h alone and compute the layer again in the backward.
    """

    qkv: Projections
    o: Projections
    gate_up: Projections
    down: Projections
    before_attention: Norm | None
    before_mlp: Norm | None
    heads: int
    key_heads: int
    head_dim: int
    scale: float
    activation: str
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    head_norms: tuple[Norm, Norm] | None = None
    rope: bool = True
    window: int | None = None
    softcap: float | None = None
    residual: float = 1.0
    checkpoint: bool = False

    @property
    def norms_span_heads(self) -> bool:
        """Whether the norms of queries and keys run over all heads at once."""
        return self.head_norms is not None and self.head_norms[0].weight.numel() != self.head_dim

    @property
    def groups(self) -> tuple[Projections, ...]:
        """The products in the order of the forward."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of all projections, in the order of :meth:`groups`."""
        return [p for group in self.groups for p in group.parameters]


@dataclasses.dataclass
class Place:
    """Where a call takes place: the stream, the documents' edges, chunks of the token sums, RoPE's cos and sin [T, rotary]."""

    stream: Stream
    edges: Edges
    chunks: Chunks
    cos: torch.Tensor | None
    sin: torch.Tensor | None


class _Saved:
    """Tensors of one forward that the backward reads."""

    __slots__ = ("gate_up", "h", "h1", "lse", "o", "qkv", "raw", "rstd", "rstd1", "rstd2", "s", "y", "y2", "rstd_y", "rstd_y2")


def _heads(buffer: torch.Tensor, first: int, count: int, size: int) -> torch.Tensor:
    """[count, T, size] view of the columns from head ``first`` on."""
    rows = buffer.shape[0]
    return buffer[:, first * size : (first + count) * size].view(rows, count, size).transpose(0, 1)


def _split(plan: Plan, qk: torch.Tensor, v: torch.Tensor):
    """(q, k, v) views, v from the product's own output."""
    n, m, d = plan.heads, plan.key_heads, plan.head_dim
    return _heads(qk, 0, n, d), _heads(qk, n, m, d), _heads(v, n + m, m, d)


def _angles(plan: Plan, place: Place):
    return (place.cos, place.sin) if plan.rope else (None, None)


def _whole(plan: Plan, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(all heads of the queries [T, heads * head_dim], all of the keys [T, key_heads * head_dim]) as columns of ``buffer``."""
    n, m = plan.heads * plan.head_dim, plan.key_heads * plan.head_dim
    return buffer[:, :n], buffer[:, n : n + m]


def _rotated(plan: Plan, qkv: torch.Tensor, place: Place):
    """(queries and keys after their norms and RoPE, the norms' statistics or None): qkv itself, turned in place, without norms."""
    n, m, d, (cos, sin) = plan.heads, plan.key_heads, plan.head_dim, _angles(plan, place)
    if plan.head_norms is not None and not plan.norms_span_heads:
        q_norm, k_norm = plan.head_norms
        return head_norm_rotate(qkv, q_norm.weight, k_norm.weight, q_norm.eps, q_norm.style, cos, sin, n, m, d)
    rotated, rstd = qkv, None
    if plan.norms_span_heads:
        rotated = torch.empty(qkv.shape[0], (n + m) * d, device=qkv.device, dtype=qkv.dtype)
        each = zip(plan.head_norms, _whole(plan, qkv), _whole(plan, rotated))
        rstd = [norm_forward(raw, norm.weight, norm.eps, norm.style, into=into)[1] for norm, raw, into in each]
    if plan.rope:
        rotate(rotated, cos, sin, n + m, d)
    return rotated, rstd


def _rotated_backward(plan: Plan, dqkv: torch.Tensor, place: Place, kept: _Saved) -> None:
    """Overwrite the columns of queries and keys by the gradient of what :func:`_rotated` took."""
    n, m, d, (cos, sin) = plan.heads, plan.key_heads, plan.head_dim, _angles(plan, place)
    if plan.head_norms is not None and not plan.norms_span_heads:
        q_norm, k_norm = plan.head_norms
        head_norm_rotate_backward(dqkv, kept.raw, kept.rstd, q_norm.weight, k_norm.weight, q_norm.style, cos, sin, n, m, d)
        return
    if plan.rope:
        rotate(dqkv, cos, sin, n + m, d, inverse=True)
    if plan.norms_span_heads:
        for norm, grad, raw, rstd in zip(plan.head_norms, _whole(plan, dqkv), _whole(plan, kept.raw), kept.rstd):
            norm_backward(grad, raw, rstd, norm.weight, norm.style, into=grad)


def _drops(plan: Plan, place: Place, device: torch.device):
    return [group.dropout(place.stream, device) for group in plan.groups]


def _attention_part(plan: Plan, h: torch.Tensor, place: Place, drops, kept: _Saved) -> torch.Tensor:
    """h -> what is added to it."""
    norm = plan.before_attention
    x, kept.rstd1 = h, None
    if norm is not None:
        x, kept.rstd1, _ = norm_forward(h, norm.weight, norm.eps, norm.style)
    qkv, s_qkv = plan.qkv.forward(x, drops[0])
    kept.raw = qkv if plan.head_norms is not None else None
    rotated, kept.rstd = _rotated(plan, qkv, place)
    q, k, v = _split(plan, rotated, qkv)
    o, kept.lse = attention_forward(q, k, v, place.edges, plan.scale, plan.window, plan.softcap)
    kept.qkv, kept.o = rotated, o.view(o.shape[0], -1)
    y, s_o = plan.o.forward(kept.o, drops[1])
    kept.s = [s_qkv, s_o]
    kept.y = kept.rstd_y = None
    if plan.after_attention is not None:
        norm = plan.after_attention
        kept.y = y
        y, kept.rstd_y, _ = norm_forward(y, norm.weight, norm.eps, norm.style)
    return y


def _up_to_down(plan: Plan, h: torch.Tensor, place: Place, drops) -> tuple[torch.Tensor, _Saved]:
    """(what the down projection takes, what the layer has kept until there)."""
    kept = _Saved()
    kept.h = h
    y = _attention_part(plan, h, place, drops, kept)
    norm = plan.before_mlp
    if norm is not None:
        x2, kept.rstd2, kept.h1 = norm_forward(h, norm.weight, norm.eps, norm.style, add=y, scale=plan.residual)
    else:
        x2 = kept.h1 = torch.add(h, y, alpha=plan.residual)
        kept.rstd2 = None
    del y
    kept.gate_up, s_gate_up, hidden = gated_forward(plan.gate_up, x2, drops[2], plan.activation)
    kept.s.append(s_gate_up)
    kept.y2 = kept.rstd_y2 = None
    return hidden, kept


def _forward(plan: Plan, h: torch.Tensor, place: Place, drops) -> tuple[torch.Tensor, _Saved]:
    hidden, kept = _up_to_down(plan, h, place, drops)
    z, s_down = plan.down.forward(hidden, drops[3])
    kept.s.append(s_down)
    if plan.after_mlp is not None:
        norm = plan.after_mlp
        kept.y2 = z
        z, kept.rstd_y2, _ = norm_forward(z, norm.weight, norm.eps, norm.style)
    return torch.add(kept.h1, z, alpha=plan.residual), kept


def _again(plan: Plan, h: torch.Tensor, place: Place, drops) -> _Saved:
    """What :func:`_forward` kept. The layer's own output is not needed, and without a norm after it neither is the last product."""
    if plan.after_mlp is not None:
        return _forward(plan, h, place, drops)[1]
    hidden, kept = _up_to_down(plan, h, place, drops)
    kept.s.append(plan.down.low(hidden, drops[3]))
    return kept


def _scaled(plan: Plan, gradient: torch.Tensor) -> torch.Tensor:
    return gradient if plan.residual == 1.0 else gradient * plan.residual


def _mlp_backward(plan: Plan, dout: torch.Tensor, place: Place, drops, kept: _Saved, beside: Beside) -> tuple[torch.Tensor, list[Later]]:
    """(gradient of h1, gradients of the parameters of gate_up and of down)."""
    dz = _scaled(plan, dout)
    if plan.after_mlp is not None:
        norm = plan.after_mlp
        dz, _ = norm_backward(dz, kept.y2, kept.rstd_y2, norm.weight, norm.style)
    dgate_up, hidden, ds, db = gated_backward(
        plan.down, dz, kept.s[3], drops[3], place.chunks, kept.gate_up, plan.activation, beside
    )
    del dz
    kept.gate_up = None
    of_down = beside.add(plan.down.gradients, hidden, ds, db, drops[3], place.chunks)
    del hidden
    dx2, ds, db = plan.gate_up.backward(dgate_up, kept.s[2], drops[2], place.chunks, beside)
    del dgate_up
    norm, x2 = plan.before_mlp, kept.h1
    if norm is not None:
        dh1, x2 = norm_backward(dx2, kept.h1, kept.rstd2, norm.weight, norm.style, residual=dout, emit=True)
    else:
        dh1 = dout + dx2
    return dh1, [beside.add(plan.gate_up.gradients, x2, ds, db, drops[2], place.chunks), of_down]


def _attention_backward(plan: Plan, dh1: torch.Tensor, place: Place, drops, kept: _Saved, needs_dh: bool, beside: Beside):
    """(gradient of h or None, gradients of the parameters of qkv and of o)."""
    dy = _scaled(plan, dh1)
    if plan.after_attention is not None:
        norm = plan.after_attention
        dy, _ = norm_backward(dy, kept.y, kept.rstd_y, norm.weight, norm.style)
    do, ds, db = plan.o.backward(dy, kept.s[1], drops[1], place.chunks, beside, kept.o)
    of_o = beside.add(plan.o.gradients, kept.o, ds, db, drops[1], place.chunks)
    v_of = kept.qkv if kept.raw is None else kept.raw
    q, k, v = _split(plan, kept.qkv, v_of)
    rows, n, m, d = dh1.shape[0], plan.heads, plan.key_heads, plan.head_dim
    dqkv = torch.empty(rows, (n + 2 * m) * d, device=dh1.device, dtype=dh1.dtype)
    attention_backward(
        do.view(rows, n, d), q, k, v, kept.o.view(rows, n, d), kept.lse, place.edges, plan.scale, plan.window, plan.softcap,
        into=_split(plan, dqkv, dqkv),
    )  # fmt: skip
    _rotated_backward(plan, dqkv, place, kept)
    if needs_dh:
        dx, ds, db = plan.qkv.backward(dqkv, kept.s[0], drops[0], place.chunks, beside)
    else:
        ds, db = plan.qkv.low_backward(dqkv, kept.s[0], drops[0], place.chunks, beside)
    norm, x, dh = plan.before_attention, kept.h, None
    if norm is None:
        dh = dh1 + dx if needs_dh else None
    elif needs_dh:
        dh, x = norm_backward(dx, kept.h, kept.rstd1, norm.weight, norm.style, residual=dh1, emit=True)
    elif plan.qkv.adapted:
        x, _, _ = norm_forward(kept.h, norm.weight, norm.eps, norm.style)
    return dh, [beside.add(plan.qkv.gradients, x, ds, db, drops[0], place.chunks), of_o]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, plan, place, *parameters):
        drops = _drops(plan, place, h.device)
        out, kept = _forward(plan, h, place, drops)
        if plan.checkpoint:
            kept = _Saved()
            kept.h = h
        ctx.plan, ctx.place, ctx.drops, ctx.kept = plan, place, drops, kept
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        plan, place, kept = ctx.plan, ctx.place, ctx.kept
        if kept is None:
            raise TrainingError("a decoder layer's backward ran twice; it keeps nothing for a second time")
        ctx.kept = None
        if not all(group.unchanged() for group in plan.groups):
            raise TrainingError("the adapter changed between a forward and its backward")
        if plan.checkpoint:
            kept = _again(plan, kept.h, place, ctx.drops)
        dout = dout.contiguous()
        with Beside(dout.device) as beside:
            dh1, of_mlp = _mlp_backward(plan, dout, place, ctx.drops, kept, beside)
            dh, of_attention = _attention_backward(plan, dh1, place, ctx.drops, kept, ctx.needs_input_grad[0], beside)
        return dh, None, None, *(gradient for of_group in of_attention + of_mlp for gradient in of_group.value)


def decoder_layer(h: torch.Tensor, plan: Plan, place: Place) -> torch.Tensor:
    """The layer's output [T, features] of h [T, features], contiguous, in the weights' dtype.

    Gradients of A and B go to ``.grad``, or in exact mode to the layers' sums.

    Raises:
        TrainingError: from the backward: run twice, or A or B changed since the forward.
        InputError: some projections are in exact mode and others not.
    """
    for group in plan.groups:
        group.prepare()
    return _DecoderLayer.apply(h, plan, place, *plan.parameters)
