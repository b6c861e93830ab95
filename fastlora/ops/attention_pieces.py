"""Attention of one document, piece by piece: the fused CPU kernel, and blocks for what it lacks.

    S = q k^T * scale      S = c tanh(S / c) with a soft-cap c      P = softmax(S + mask)
    O = P v                dP = dO v^T                              dS = P (dP - rowsum(O dO))
    dq = dS k scale        dk = dS^T q scale                        dv = P^T dO

A piece is one or more heads of one document (and in the forward of :class:`Blocked` one block of
queries), computed whole on one thread. How a document is cut depends on its length alone.

:class:`Fused` calls torch's fused CPU kernel by name, so that no dispatch rule can choose another
one. :class:`Blocked` is for windows shorter than the document, soft-caps, values of another width
than the keys, and other devices: 128 queries see the keys before their end (inside the window), and
the backward computes P again from the saved log-sum-exp (Dao et al., "FlashAttention", 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

QUERY_ROWS = 128
# Window starts are rounded down to whole 64-byte lines of keys, whatever the head's width.
KEY_ALIGN = 16
# A document of at most this many tokens has all its heads in one piece.
SHORT = 128


@dataclass(frozen=True)
class Rule:
    """What attention to compute: ``scale``, ``window`` and ``softcap`` as in ``attention``."""

    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Tensors:
    """q [Hq,T,D], k [Hk,T,D], v [Hk,T,E], out [T,Hq,E], lse fp32 [Hq,T] (log-sum-exp of S)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def groups(self) -> int:
        """Query heads that share one key-value head."""
        return self.q.shape[0] // self.k.shape[0]


@dataclass(frozen=True)
class Gradients:
    """dout [T,Hq,E], dq like q, and fp32 shares of dk [Hq,T,D] and dv [Hq,T,E], a query head
    each.
    """

    dout: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Fused:
    """Whole heads of one document through torch's fused CPU kernel."""

    @staticmethod
    def fits(t: Tensors, rule: Rule, length: int) -> bool:
        """Whether the kernel computes this document."""
        windowed = rule.window is not None and rule.window < length
        plain = rule.softcap is None and not windowed and t.q.shape[2] == t.v.shape[2]
        return t.q.device.type == "cpu" and plain

    @staticmethod
    def pieces(t: Tensors, rule: Rule, start: int, stop: int) -> list[tuple[int, int]]:
        """(first head, end of heads) of every piece, forward and backward."""
        step = t.q.shape[0] if stop - start <= SHORT else 1
        return [(head, head + step) for head in range(0, t.q.shape[0], step)]

    @staticmethod
    def _inputs(t: Tensors, heads: slice, start: int, stop: int) -> list[torch.Tensor]:
        """q, k, v of the piece as contiguous [1, heads, L, D], keys repeated for their group."""
        q = t.q[heads, start:stop].contiguous().unsqueeze(0)
        shared = slice(heads.start // t.groups, -(-heads.stop // t.groups))
        count = heads.stop - heads.start
        kv = []
        for x in (t.k, t.v):
            x = x[shared, start:stop].contiguous()
            if x.shape[0] != count:
                x = x.repeat_interleave(t.groups, dim=0)
            kv.append(x.unsqueeze(0))
        return [q, *kv]

    @classmethod
    def forward(cls, t: Tensors, rule: Rule, start: int, stop: int, piece: tuple) -> None:
        """Write ``out`` and ``lse`` of the piece."""
        heads = slice(*piece)
        q, k, v = cls._inputs(t, heads, start, stop)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=rule.scale
        )
        t.out[start:stop, heads] = out[0].transpose(0, 1)
        t.lse[heads, start:stop] = lse[0]

    @classmethod
    def backward(
        cls, t: Tensors, g: Gradients, rule: Rule, start: int, stop: int, piece: tuple
    ) -> None:
        """Write dq and the heads' shares of dk and dv."""
        heads = slice(*piece)
        q, k, v = cls._inputs(t, heads, start, stop)
        dout, out = (x[start:stop, heads].transpose(0, 1).contiguous() for x in (g.dout, t.out))
        lse = t.lse[heads, start:stop].contiguous()
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.unsqueeze(0) if x.dim() == 3 else x for x in (dout, q, k, v, out)),
            lse.unsqueeze(0), 0.0, True, scale=rule.scale,
        )  # fmt: skip
        for target, grad in zip((g.dq, g.dk, g.dv), grads, strict=True):
            target[heads, start:stop] = grad[0]


class Blocked:
    """One head of one document in blocks of queries, by plain products in fp32."""

    @staticmethod
    def _cut(rule: Rule, length: int) -> list[tuple[int, int, int]]:
        """(first query, end of queries, first key) of every block of a document."""
        cut = []
        for low in range(0, length, QUERY_ROWS):
            first = 0 if rule.window is None else max(0, low - rule.window + 1)
            cut.append((low, min(low + QUERY_ROWS, length), first // KEY_ALIGN * KEY_ALIGN))
        return cut

    @classmethod
    def pieces(cls, t: Tensors, rule: Rule, start: int, stop: int) -> list[tuple]:
        """(head,) of every piece."""
        return [(head,) for head in range(t.q.shape[0])]

    @staticmethod
    def _scores(q: torch.Tensor, k: torch.Tensor, rule: Rule, low: int, high: int, first: int):
        """(masked scores fp32 [high-low, high-first], tanh(S/c) or None) from scaled q."""
        s = torch.mm(q, k.t())
        capped = None
        if rule.softcap is not None:
            capped = s.mul_(1.0 / rule.softcap).tanh_()
            s = capped * rule.softcap
        queries = torch.arange(low, high, device=s.device).unsqueeze(1)
        keys = torch.arange(first, high, device=s.device).unsqueeze(0)
        hidden = keys > queries
        if rule.window is not None:
            hidden |= queries - keys >= rule.window
        return s.masked_fill_(hidden, float("-inf")), capped

    @classmethod
    def forward(cls, t: Tensors, rule: Rule, start: int, stop: int, piece: tuple) -> None:
        """Write ``out`` and ``lse`` of the head."""
        (head,) = piece
        k = t.k[head // t.groups, start:stop].float().contiguous()
        v = t.v[head // t.groups, start:stop].float().contiguous()
        for low, high, first in cls._cut(rule, stop - start):
            rows = slice(start + low, start + high)
            q = t.q[head, rows].float().mul(rule.scale)
            s, _ = cls._scores(q, k[first:high], rule, low, high, first)
            top = s.amax(1, keepdim=True)
            p = s.sub_(top).exp_()
            total = p.sum(1, keepdim=True)
            t.out[rows, head] = torch.mm(p, v[first:high]).div_(total).to(t.out.dtype)
            t.lse[head, rows] = total.log_().add_(top).squeeze(1)

    @classmethod
    def backward(
        cls, t: Tensors, g: Gradients, rule: Rule, start: int, stop: int, piece: tuple
    ) -> None:
        """Write dq and the head's share of dk and dv."""
        (head,) = piece
        k = t.k[head // t.groups, start:stop].float().contiguous()
        v = t.v[head // t.groups, start:stop].float().contiguous()
        dk, dv = g.dk[head, start:stop].zero_(), g.dv[head, start:stop].zero_()
        for low, high, first in cls._cut(rule, stop - start):
            rows, keys = slice(start + low, start + high), slice(first, high)
            q = t.q[head, rows].float().mul(rule.scale)
            dout, out = (x[rows, head].float().contiguous() for x in (g.dout, t.out))
            s, capped = cls._scores(q, k[keys], rule, low, high, first)
            p = s.sub_(t.lse[head, rows].unsqueeze(1)).exp_()
            dv[keys].addmm_(p.t(), dout)
            ds = torch.mm(dout, v[keys].t()).sub_((dout * out).sum(1, keepdim=True)).mul_(p)
            if capped is not None:
                ds.mul_(capped.square_().neg_().add_(1.0))
            dk[keys].addmm_(ds.t(), q)
            g.dq[head, rows] = torch.mm(ds, k[keys]).mul_(rule.scale).to(g.dq.dtype)
