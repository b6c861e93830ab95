"""Metamorphic relations of a LoRA linear: what must hold between two calls, whatever the right answer is.

(Chen, Cheung, Yiu, "Metamorphic testing", 1998.) Each relation compares results whose exact values must be equal.
Where powers of two make the arithmetic itself the same, bits must be; elsewhere two results may be apart by the sum of
their radii (``verify/graphs.py``). None needs the oracle: a subject and an oracle with the same misunderstanding still
part here, because a relation mixes calls of different rank, scale and shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from verify import graphs
from verify.bounds import Bounded
from verify.oracle.linear import scale_of
from verify.subject import EXACT, LinearInputs, LinearResult

# (None and a share of the bound, or whether bits that must be equal are not; 0; a sentence)
Found = tuple[bool | None, float, str]
NAMES = ("y", "dx", "da", "db")


def _cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def radii(inputs: LinearInputs, rules: graphs.Roundings, keep=None) -> graphs.LinearBounds:
    """The graph's intervals of one call."""
    tensors = [_cpu(t) for t in (inputs.x, inputs.weight, inputs.a, inputs.b)]
    scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    return graphs.lora_linear(*tensors, scale, _cpu(inputs.bias), _cpu(inputs.dy), _cpu(keep), inputs.dropout, rules)


def _apart(one: torch.Tensor, two: torch.Tensor, *bounds: Bounded | torch.Tensor) -> float:
    """Their largest distance as a share of the summed radii; elements with an infinite radius are left out."""
    allowed = sum(b.radius if isinstance(b, Bounded) else b for b in bounds)
    error = (_cpu(one).double() - _cpu(two).double()).abs()
    # tolerance-rule: float64's own rounding: of the radii, sums of up to 2^13 terms (2^-40 of themselves), and of
    # adding and scaling results.
    eps, sizes = torch.finfo(torch.float64).eps, _cpu(one).double().abs() + _cpu(two).double().abs()
    allowed = allowed * (1 + 2.0**13 * eps) + 4 * eps * sizes
    share = torch.where(error == 0, torch.zeros_like(error), error / allowed)
    share = torch.where(allowed.isfinite(), torch.where(share.isnan(), torch.inf, share), 0.0)
    return float(share.max()) if share.numel() else 0.0


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(_cpu(one), _cpu(two))


def linear_in_dy(part, inputs: LinearInputs, mode: str, result: LinearResult, bounds) -> Iterator[Found]:
    """dY times 4, and dY as a sum of two."""
    by = 4.0
    scaled = part.run(dataclasses.replace(inputs, dy=inputs.dy * by), mode)
    inside = _normal(inputs.dy * by) and all(_normal(t, by) for t in (result.dx, result.da, result.db))
    for name in ("dx", "da", "db"):
        one, two = getattr(scaled, name), getattr(result, name) * by
        if inside and not (mode == EXACT and name != "dx") and _keeps_bits(inputs):
            yield not _same(one, two), 0.0, f"dY times {by:g} does not give {name} times {by:g} bit for bit"
        else:
            wide = Bounded(getattr(bounds, name).value, getattr(bounds, name).radius * by)
            again = getattr(
                radii(
                    dataclasses.replace(inputs, dy=inputs.dy * by), part.roundings(inputs.x.dtype, mode), result.keep
                ),
                name,
            )
            yield None, _apart(one, two, wide, again), f"dY times {by:g} does not give {name} times {by:g}"
    if inputs.dy.shape[0] < 2:
        return
    # Some rows in one, the others in the other: the sum is exact in any dtype.
    half = torch.zeros_like(inputs.dy)
    half[::2] = inputs.dy[::2]
    halves = [dataclasses.replace(inputs, dy=dy) for dy in (half, inputs.dy - half)]
    rules = part.roundings(inputs.x.dtype, mode)
    parts = [(part.run(one, mode), radii(one, rules, result.keep)) for one in halves]
    for name in ("dx", "da", "db"):
        total = sum(getattr(r, name).double() for r, _ in parts)
        allowed = [getattr(b, name) for _, b in parts]
        share = _apart(total, getattr(result, name), getattr(bounds, name), *allowed)
        yield None, share, f"{name} of dY1 + dY2 is not the sum of theirs"


def _normal(tensor: torch.Tensor, by: float = 1.0) -> bool:
    """Whether every element, also times ``by``, is 0 or a normal number far from both ends of its dtype's range.

    Far: intermediates of a call are larger or smaller than its results, S by alpha and the rank.
    """
    values = tensor.detach().abs()
    values = values[values > 0]
    if not values.numel():
        return True
    limits = torch.finfo(tensor.dtype)
    least, most = float(values.min()), float(values.max()) * by
    return least >= limits.smallest_normal * 2.0**8 and most <= limits.max / 2.0**8


def _keeps_bits(inputs: LinearInputs) -> bool:
    """Whether bits may be asked for: fp16 intermediates have so few exponents that one may leave them unseen, and a
    product of other strides may be summed in another order."""
    return inputs.x.dtype != torch.float16 and inputs.x.is_contiguous() and inputs.dy.is_contiguous()


# What :func:`related` tries, by name.
RELATIONS = (
    "tokens permuted", "alpha times 8 and B divided by 8", "a rank split in two", "rank padded with zeros",
    "projections joined",
)  # fmt: skip


def related(part, inputs: LinearInputs, mode: str, result: LinearResult) -> Iterator[tuple[str, Found]]:
    """Calls of other shapes against ``result`` of ``inputs``, which has no dropout."""
    rules = part.roundings(inputs.x.dtype, mode)

    def call(**changes) -> tuple[LinearResult, graphs.LinearBounds]:
        changed = dataclasses.replace(inputs, **changes)
        return part.run(changed, mode), radii(changed, rules)

    own = result, radii(inputs, rules)
    for name, found in zip(RELATIONS, (_permuted, _rescaled, _split, _padded, _joined)):
        for one in found(inputs, mode, own, call):
            yield name, one


def _pair(what: str, got: torch.Tensor, wanted: torch.Tensor, *bounds) -> Found:
    return None, _apart(got, wanted, *bounds), f"{what} differs"


def _permuted(inputs, mode, own, call) -> Iterator[Found]:
    (result, bound), rows = own, inputs.x.shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows)).to(inputs.x.device)
    other, wide = call(x=inputs.x[order], dy=inputs.dy[order], tokens=inputs.tokens[order])
    place = order.cpu()
    for name in NAMES:
        own_radius = getattr(bound, name).radius
        if name in ("y", "dx"):
            wanted, own_radius = getattr(result, name)[order], own_radius[place]
        else:
            wanted = getattr(result, name)
        yield _pair(name, getattr(other, name), wanted, own_radius, getattr(wide, name))


def _rescaled(inputs, mode, own, call) -> Iterator[Found]:
    """S is 8 times itself and B an 8th: every product is the same number, and dB 8 times itself."""
    (result, bound), by = own, 8.0
    dtype = inputs.x.dtype
    if not _same((inputs.b / by).to(dtype) * by, inputs.b.to(dtype)):
        # B, read in the working dtype, is another number: an 8th of an element is subnormal in fp16.
        return
    other, wide = call(alpha=inputs.alpha * by, b=inputs.b / by)
    inside = _keeps_bits(inputs) and all(_normal(getattr(result, name), by) for name in NAMES)
    for name in NAMES:
        factor = by if name == "db" else 1.0
        wanted = getattr(result, name) * factor
        if inside and not (mode == EXACT and name == "db"):
            yield not _same(getattr(other, name), wanted), 0.0, f"{name} has other bits"
        else:
            yield _pair(name, getattr(other, name), wanted, getattr(bound, name).radius * factor, getattr(wide, name))


def _split(inputs, mode, own, call) -> Iterator[Found]:
    """(A1, B1) and (A2, B2) apart give what they give together; the base is in each."""
    rank = inputs.rank
    if rank < 2:
        return
    at, scale = rank // 2, 2.0
    (whole, b0), (bare, bz) = (
        call(alpha=scale * rank, rslora=False, b=b) for b in (inputs.b, torch.zeros_like(inputs.b))
    )
    halves = [
        call(alpha=scale * len(a), rslora=False, a=a.contiguous(), b=b.contiguous())
        for a, b in ((inputs.a[:at], inputs.b[:, :at]), (inputs.a[at:], inputs.b[:, at:]))
    ]
    for name in ("y", "dx"):
        together = getattr(whole, name).double() + getattr(bare, name).double()
        apart = sum(getattr(r, name).double() for r, _ in halves)
        yield _pair(name, apart, together, getattr(b0, name), getattr(bz, name), *(getattr(b, name) for _, b in halves))
    for name, axis in (("da", 0), ("db", 1)):
        joined = torch.cat([getattr(r, name) for r, _ in halves], axis)
        radius = torch.cat([getattr(b, name).radius for _, b in halves], axis)
        yield _pair(name, joined, getattr(whole, name), getattr(b0, name), radius)


def _padded(inputs, mode, own, call) -> Iterator[Found]:
    """Three more rows of A and columns of B, all 0: nothing changes, and their own gradients are exactly 0."""
    rank, more = inputs.rank, 3
    if rank + more > 256:
        return
    whole, b0 = call(alpha=2.0 * rank, rslora=False)
    a = torch.cat([inputs.a, inputs.a.new_zeros(more, inputs.a.shape[1])])
    b = torch.cat([inputs.b, inputs.b.new_zeros(inputs.b.shape[0], more)], 1)
    wide, b1 = call(alpha=2.0 * (rank + more), rslora=False, a=a, b=b)
    for name, cut in (("y", ...), ("dx", ...), ("da", slice(rank)), ("db", (slice(None), slice(rank)))):
        got, radius = getattr(wide, name)[cut], getattr(b1, name).radius[cut]
        yield _pair(name, got, getattr(whole, name), getattr(b0, name), radius)
    finite = bool(inputs.x.isfinite().all()) and bool(whole.da.isfinite().all()) and bool(whole.db.isfinite().all())
    extra = bool(wide.da[rank:].any()) or bool(wide.db[:, rank:].any())
    yield finite and extra, 0.0, "the gradients of zero rows and columns are not 0"


def _joined(inputs, mode, own, call) -> Iterator[Found]:
    """Two projections of one input, one below the other, against each by itself."""
    (result, bound), outer = own, inputs.weight.shape[0]
    if outer < 2:
        return
    at = outer // 2
    parts = [
        call(weight=inputs.weight[rows], b=inputs.b[rows], dy=inputs.dy[:, rows],
             bias=None if inputs.bias is None else inputs.bias[rows])
        for rows in (slice(at), slice(at, None))
    ]  # fmt: skip
    for name, axis in (("y", 1), ("db", 0)):
        joined = torch.cat([getattr(r, name) for r, _ in parts], axis)
        radius = torch.cat([getattr(b, name).radius for _, b in parts], axis)
        yield _pair(name, joined, getattr(result, name), getattr(bound, name), radius)
    for name in ("dx", "da"):
        total = sum(getattr(r, name).double() for r, _ in parts)
        yield _pair(name, total, getattr(result, name), getattr(bound, name), *(getattr(b, name) for _, b in parts))
