"""The values and strides that cases are made of."""

from __future__ import annotations

import torch

# How the values are made. ``lora_alone`` and ``grid`` judge the LoRA part alone; ``zeros``, ``tiny`` and ``huge`` are
# the ends of a dtype's range, as cases of their own.
VALUES = (
    "normal",
    "normal",
    "normal",
    "heavy",
    "cancelling",
    "lora_alone",
    "lora_alone",
    "grid",
    "zeros",
    "tiny",
    "huge",
)

# What x and dy are multiplied by in ``tiny`` and ``huge``. Tiny: elements of x and dy are subnormal, or become so in a
# product with the scale. Huge: single results come near the largest number, and some partial sums pass it: what must
# overflow is not judged, and integer sums refuse it by name.
TINY = {torch.float32: 2.0**-128, torch.bfloat16: 2.0**-128, torch.float16: 2.0**-15}
HUGE = {torch.float32: 2.0**122, torch.bfloat16: 2.0**120, torch.float16: 2.0**13}


def draw(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """float64 values of ``shape``: small integers for a grid, Student-t (2.5 degrees) for heavy tails, else normal; of
    ``zeros`` three in four are 0 or -0."""
    if kind == "grid":
        return torch.randint(-2, 3, shape, generator=generator).double()
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        zero = torch.rand(shape, generator=generator) < 0.75
        return torch.where(zero, torch.zeros_like(normal).copysign(normal), normal)
    if kind != "heavy":
        return normal
    chi = sum(torch.randn(shape, generator=generator, dtype=torch.float64).square() for _ in range(3)) / 3
    return (normal / chi.sqrt()).clamp(-30, 30)


def size_of(kind: str, dtype: torch.dtype) -> float:
    """What x and dy of a kind are multiplied by, a power of two."""
    return {"tiny": TINY, "huge": HUGE}.get(kind, {}).get(dtype, 1.0)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides: a slice of columns or rows, transposed, or stride 0."""
    rows, columns = tensor.shape
    if layout == "columns":
        wide = torch.full((rows, columns + 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
        wide[:, 1 : columns + 1] = tensor
        return wide[:, 1 : columns + 1]
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "rows":
        tall = torch.full((rows * 2, columns), float("nan"), dtype=tensor.dtype, device=tensor.device)
        tall[::2] = tensor
        return tall[::2]
    if layout == "expanded" and rows:
        return tensor[:1].expand(rows, columns)
    return tensor
