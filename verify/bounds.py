"""How far a correct result may lie from the exact one, by rounding theory, element by element.

A :class:`Bounded` tensor is an exact value with a radius: every computation that rounds where it
was declared to round lies inside. Each function below is one node of an operation graph and derives
its radius; the graphs themselves are in ``graphs.py``. Sources:

- N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM 2002: section
2.1
  for the unit roundoff and underflow; lemma 3.1 for gamma_n = n u / (1 - n u); section 3.1 for
  inner products summed in any order.
- N. J. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
  Comput. 41(5), 2019: the sqrt(n) form.
- M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ
  Computer Science 7:e330, 2021: products exact, sums aligned to the largest exponent and truncated,
  in blocks of at least 4.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# The sqrt(n) form fails for one inner product with probability at most 2 exp(-LAMBDA^2 (1 - u)^2 /
# 2): for 9 and u = 2^-8 that is below 1e-17, so below 1e-9 for a hundred million elements. Used
# only where n u > 1/4, where the worst case says nothing; that is a 16-bit accumulator or a sum of
# over four million fp32 terms.
LAMBDA = 9.0

# Operations in fp32 may flush results below the smallest normal number to zero (GPUs and MKL do).
FLUSH = 2.0**-126


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, half the distance from 1 to the next number: |RN(x) - x| <= u |x| (theorem 2.2)."""
    return torch.finfo(dtype).eps / 2


def gamma(n: torch.Tensor | float, u: float) -> torch.Tensor:
    """gamma_n = n u / (1 - n u) for n roundings on one path (lemma 3.1), or the sqrt(n) form.

    Where n u > 1/4 the worst case is of no use and the radius is
    exp(LAMBDA sqrt(n) u + n u^2 / (1 - u)) - 1 (Higham and Mary 2019, theorem 2.4).
    """
    n = torch.as_tensor(n, dtype=torch.float64)
    worst = n * u / (1 - (n * u).clamp(max=0.5))
    likely = torch.expm1(LAMBDA * n.sqrt() * u + n * u * u / (1 - u))
    return torch.where(n * u > 0.25, likely, worst)


@dataclass(frozen=True)
class Accumulator:
    """What sums are kept in. ``truncating`` models tensor cores; False is round to nearest."""

    dtype: torch.dtype = torch.float32
    truncating: bool = False

    def factor(self, n: torch.Tensor) -> torch.Tensor:
        """The radius of an n-term inner product over the sum of absolute products.

        Rounding to nearest: gamma_n with u, for any order and with or without fused multiply-add
        (Higham section 3.1: n - 1 additions and one product on a path). Truncating: every addend of
        a block is cut at the last place of the largest, an error below one unit, 2u, and blocks of
        at least 4 add one addition of the block each: n + ceil(n / 4) cuts of 2u.
        """
        u = unit_roundoff(self.dtype)
        return gamma(n + torch.ceil(n / 4), 2 * u) if self.truncating else gamma(n, u)

    @property
    def exact_integers(self) -> float:
        """Sums of integers whose absolute values add up to at most this are exact in any order.

        2^t for t significant bits: each partial sum is an integer of at most t bits. Two bits less
        where addends are aligned and cut, so that the last place of the largest addend is a whole
        number still.
        """
        bits = 1 - round(math.log2(torch.finfo(self.dtype).eps))
        return 2.0 ** (bits - 2 if self.truncating else bits)


@dataclass(frozen=True)
class Bounded:
    """``value``: exact, float64. ``radius`` >= 0, float64: a correct result lies within it of
    ``value``."""

    value: torch.Tensor
    radius: torch.Tensor

    @property
    def T(self) -> Bounded:  # noqa: N802 (as torch writes it)
        """Transposed."""
        return Bounded(self.value.T, self.radius.T)

    @property
    def magnitude(self) -> torch.Tensor:
        """The largest absolute value inside the radius."""
        return self.value.abs() + self.radius


_home = "cpu"


@contextlib.contextmanager
def judged_on(device: torch.device | str) -> Iterator[None]:
    """Values, radii and errors are computed on ``device`` meanwhile, in float64; else on the CPU, away from what is judged there."""
    global _home
    before, _home = _home, device
    try:
        yield
    finally:
        _home = before


def at_home(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where it is judged."""
    return tensor.detach().to(_home)


def exact(tensor: torch.Tensor) -> Bounded:
    """An input: known without error."""
    value = at_home(tensor).double()
    return Bounded(value, torch.zeros_like(value))


def store(b: Bounded, dtype: torch.dtype | None) -> Bounded:
    """Round to nearest into ``dtype`` (None: not stored). The value stays exact, the radius grows.

    Rounding is monotone, so a result inside [v - e, v + e] is stored inside [RN(v - e), RN(v + e)];
    the radius is the farther end (at most e + u (|v| + e), and 0 for a representable value known
    exactly). A subject that keeps more digits than declared is inside as well. Underflow is in RN
    itself; FLUSH covers flushing to zero. An end that overflows gives an infinite radius: such an
    element is not judged.
    """
    if dtype is None:
        return b
    low, high = (b.value - b.radius).to(dtype).double(), (b.value + b.radius).to(dtype).double()
    radius = torch.maximum((low - b.value).abs(), (high - b.value).abs())
    flushed = (b.value.abs() - b.radius < FLUSH) & (b.magnitude > 0)
    radius = torch.maximum(radius, torch.where(flushed, b.magnitude.clamp(max=FLUSH), 0.0))
    return Bounded(b.value, torch.maximum(radius, b.radius))


def roundings(b: Bounded, count: int, dtype: torch.dtype = torch.float32) -> Bounded:
    """``count`` elementwise roundings on the path: radius + gamma_count (|v| + e), and underflow."""
    grow = gamma(count, unit_roundoff(dtype)) * b.magnitude
    return Bounded(b.value, b.radius + grow + count * FLUSH * (b.magnitude > 0))


def times(b: Bounded, scalar: float) -> Bounded:
    """An fp32 product with a host scalar: scalar and product are both rounded (2 roundings).

    A power of two is exact in both.
    """
    moved = Bounded(b.value * scalar, b.radius * abs(scalar))
    power_of_two = scalar != 0 and abs(math.frexp(scalar)[0]) == 0.5
    return moved if power_of_two else roundings(moved, 2)


def where(keep: torch.Tensor | None, b: Bounded) -> Bounded:
    """Zero, exactly, where ``keep`` is False."""
    if keep is None:
        return b
    zero = b.value.new_zeros(())
    return Bounded(torch.where(keep, b.value, zero), torch.where(keep, b.radius, zero))


def grid_of(tensor: torch.Tensor) -> float:
    """The largest power of two that divides every element (infinite for all zeros)."""
    values = tensor[tensor != 0].abs()
    if values.numel() == 0:
        return math.inf
    mantissa, exponent = torch.frexp(values)
    digits = (mantissa * 2.0**53).to(torch.int64)
    lowest = torch.log2((digits & -digits).double())
    return 2.0 ** float((lowest - 53 + exponent).min())


def read(b: Bounded) -> Bounded:
    """An operand as hardware may read it: a number below the smallest normal one of fp32 may count as zero.

    So do bf16 products on some CPUs, and fp32 ones where "denormals are zero" is on.
    """
    tiny = (b.value.abs() < FLUSH) & (b.value != 0)
    if not bool(tiny.any()):
        return b
    return Bounded(b.value, torch.where(tiny, torch.maximum(b.radius, b.value.abs()), b.radius))


def accumulate(
    pairs: list[tuple[Bounded, Bounded]],
    extras: list[Bounded],
    accumulator: Accumulator,
    longest: int | None = None,
) -> Bounded:
    """The sum of ``p @ q`` over ``pairs`` and of ``extras``, in one chain or several, in any order.

    Radius, with the inputs' radii e_p, e_q and n the number of non-zero terms of an element (adding
    an exact zero rounds nothing; never more than ``longest`` on one path, plus the extras, where
    sums restart in chunks)::

        sum |p| e_q + e_p |q| + e_p e_q  +  factor(n) sum (|p| + e_p)(|q| + e_q)  +  n FLUSH

    The middle term is 0 where all terms are whole multiples of one power of two g, known without
    error, and their absolute values add up to at most ``exact_integers`` g: then every partial sum
    is representable.

    Where the absolute values could pass the accumulator's largest number the radius is infinite: a partial sum may
    overflow though the whole does not.
    """
    pairs, extras = [(read(p), read(q)) for p, q in pairs], [read(e) for e in extras]
    value = sum((p.value @ q.value for p, q in pairs), start=sum(e.value for e in extras))
    total = sum(
        (p.magnitude @ q.magnitude for p, q in pairs), start=sum(e.magnitude for e in extras)
    )
    zero = torch.zeros((), dtype=torch.float64)
    carried = sum((_carried(p, q) for p, q in pairs), start=sum(e.radius for e in extras))
    count = sum((_terms(p, q) for p, q in pairs), start=zero)
    if longest is not None:
        count = count.clamp(max=float(longest))
    count = count + sum((nonzero(e) for e in extras), start=zero)
    rounded = accumulator.factor(count) * total + count * FLUSH
    inputs = [b for pair in pairs for b in pair] + list(extras)
    if all(not bool(b.radius.any()) for b in inputs):
        grids = [grid_of(p.value) * grid_of(q.value) for p, q in pairs]
        grids += [grid_of(e.value) for e in extras]
        grid = min(grids, default=math.inf)
        if math.isfinite(grid) and grid >= FLUSH:
            fine = total <= accumulator.exact_integers * grid
            rounded = torch.where(fine, torch.zeros_like(rounded), rounded)
    overflows = total + rounded > torch.finfo(accumulator.dtype).max
    return Bounded(value, torch.where(overflows, math.inf, carried + rounded))


def _carried(p: Bounded, q: Bounded) -> torch.Tensor:
    """|p| e_q + e_p (|q| + e_q), without the products that are zero."""
    carried = torch.zeros((), dtype=torch.float64)
    if bool(q.radius.any()):
        carried = carried + p.value.abs() @ q.radius
    if bool(p.radius.any()):
        carried = carried + p.radius @ q.magnitude
    return carried


def _terms(p: Bounded, q: Bounded) -> torch.Tensor:
    """How many products of each element are not zero; counts below 2^24 are exact in fp32."""
    left, right = p.magnitude > 0, q.magnitude > 0
    if bool(left.all()) and bool(right.all()):
        return torch.tensor(float(p.value.shape[1]), dtype=torch.float64)
    return (left.float() @ right.float()).double()


def nonzero(b: Bounded) -> torch.Tensor:
    """1.0 where a term may differ from zero."""
    return (b.magnitude > 0).double()


def fixed_point(b: Bounded, chunks: int, lsb_bits: int) -> Bounded:
    """A sum of ``chunks`` partials, each rounded at 2^-lsb_bits: half a unit each, added exactly.

    chunks x 2^-41 for 40 bits. A partial that is a whole number of units already adds nothing,
    which the grid of the exact sum does not show; so the term is always counted, except where the
    value can only be zero.
    """
    return Bounded(b.value, b.radius + chunks * 2.0 ** -(lsb_bits + 1) * (b.magnitude > 0))
