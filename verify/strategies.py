"""Cases nobody chose by hand: hypothesis strategies, and the ordered list that a seed fixes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from verify.oracle.adamw import Hyper
from verify.strategies_adapter import adapter_cases
from verify.subject import Cut, LinearInputs, TrainCase
from verify.values import VALUES, draw, laid_out, size_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def short_names(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    """The short names of a subject's dtypes, in its order: the first is the first that is drawn."""
    return tuple(name for dtype in dtypes for name, known in DTYPES.items() if known == dtype)

# One row, edges of tiles and of 16-byte vectors on both sides, primes, and none of these.
FEATURES = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    61,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    131,
    192,
    257,
)
TOKENS = (
    0,
    1,
    2,
    3,
    5,
    15,
    16,
    17,
    31,
    64,
    65,
    127,
    128,
    129,
    130,
    191,
    255,
    256,
    257,
    300,
    383,
    385,
)
RANKS = (1, 2, 3, 4, 5, 7, 8, 8, 15, 16, 16, 17, 24, 31, 32, 33, 64)
LARGE_RANKS = (65, 100, 127, 128, 129, 200, 255, 256)
SCALES = (2.0**-12, 2.0**-4, 1.0, 1.0, 1.0, 2.0**3)

LAYOUTS = ("plain", "plain", "columns", "transposed", "rows", "expanded")


@dataclass(frozen=True)
class LinearCase:
    """One case of the LoRA linear; its text is a reproduction: ``repr`` back into Python gives it."""

    m: int
    k: int
    n: int
    r: int
    dtype: str
    alpha: float
    rslora: bool
    bias: bool
    dropout: float
    values: str
    size: float
    layout: str
    seed: int

    def inputs(self, device: str = "cpu") -> LinearInputs:
        """The tensors, drawn on the CPU from the seed, then moved; x and dy keep their strides."""
        pen = torch.Generator().manual_seed(self.seed)
        kind, dtype = self.values, DTYPES[self.dtype]
        # An end of the range in x or in dy, not in both: their product would be 0, or infinite, throughout.
        end = size_of(kind, dtype)
        of_x, of_dy = (1.0, end) if self.seed % 2 else (end, 1.0)
        x = draw(kind, (self.m, self.k), pen) * of_x * (self.size if end == 1 and kind != "grid" else 1.0)
        weight = draw(kind, (self.n, self.k), pen)
        a, b = draw(kind, (self.r, self.k), pen), draw(kind, (self.n, self.r), pen)
        dy, bias = draw(kind, (self.m, self.n), pen) * of_dy, draw(kind, (self.n,), pen)
        if kind != "grid":
            weight, a, b = weight / self.k**0.5, a / self.k**0.5, b / self.r**0.5
        if kind == "lora_alone":
            weight = torch.zeros_like(weight)
        if kind == "cancelling" and self.m > 1:
            # Pairs of tokens whose gradients cancel to within the 16-bit rounding of the second.
            half = self.m // 2
            x[half : 2 * half] = x[:half]
            dy[half : 2 * half] = -dy[:half] * (1 + 2.0**-9)
        return LinearInputs(
            x=laid_out(x.to(dtype).to(device), self.layout),
            weight=weight.to(dtype).to(device),
            a=a.float().to(device),
            b=b.float().to(device),
            bias=bias.to(dtype).to(device) if self.bias else None,
            dy=laid_out(dy.to(dtype).to(device), self.layout),
            alpha=self.alpha,
            rslora=self.rslora,
            dropout=self.dropout,
            tokens=torch.randint(0, 2**62, (self.m,), generator=pen).to(device),
            seed=int(torch.randint(0, 2**62, (), generator=pen)),
        )


def affordable(case: LinearCase, part) -> bool:
    """Whether a claim that calls a case many times may take it: by the part's ``most_products``, where it has one."""
    return case.m * case.k * case.n <= getattr(part, "most_products", math.inf)


def linear_cases(dtypes: tuple[str, ...]) -> st.SearchStrategy[LinearCase]:
    """Cases of the LoRA linear for working dtypes by short name ("fp32", "bf16", "fp16").

    Ranks above 64 come with small shapes, so that a case stays below about ten million products.
    """

    def build(large, small_rank, large_rank, m, k, n, **rest):
        if large:
            return LinearCase(m=min(m, 65), k=min(k, 65), n=min(n, 65), r=large_rank, **rest)
        return LinearCase(m=m, k=k, n=n, r=small_rank, **rest)

    return st.builds(
        build,
        large=st.sampled_from((False,) * 9 + (True,)),
        small_rank=st.sampled_from(RANKS),
        large_rank=st.sampled_from(LARGE_RANKS),
        m=st.sampled_from(TOKENS) | st.integers(1, 390),
        k=st.sampled_from(FEATURES) | st.integers(1, 260),
        n=st.sampled_from(FEATURES) | st.integers(1, 260),
        dtype=st.sampled_from(dtypes),
        alpha=st.sampled_from((0.5, 1.0, 3.0, 8.0, 16.0, 32.0, 57.0)),
        rslora=st.booleans(),
        bias=st.booleans(),
        dropout=st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.5)),
        values=st.sampled_from(VALUES),
        size=st.sampled_from(SCALES),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 2**31 - 1),
    )


LENGTHS = st.lists(
    st.sampled_from((1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 140)) | st.integers(1, 150),
    min_size=3,
    max_size=7,
)


@dataclass(frozen=True)
class SplitCase:
    """Documents through one linear; ``cuts`` are tried beside "all in one"."""

    lengths: tuple[int, ...]
    k: int
    n: int
    r: int
    dtype: str
    dropout: float
    seed: int


def split_cases(dtypes: tuple[str, ...]) -> st.SearchStrategy[SplitCase]:
    """Uneven documents for a single linear."""
    return st.builds(
        SplitCase,
        lengths=LENGTHS.map(tuple),
        k=st.sampled_from((16, 33, 64, 128, 192)),
        n=st.sampled_from((16, 31, 64, 130)),
        r=st.sampled_from((1, 4, 8, 16, 17)),
        dtype=st.sampled_from(dtypes),
        dropout=st.sampled_from((0.0, 0.1)),
        seed=st.integers(0, 2**31 - 1),
    )


def train_cases() -> st.SearchStrategy[TrainCase]:
    """Tiny models with uneven sequences of at least 4 tokens."""
    length = st.sampled_from((5, 16, 17, 31, 40)) | st.integers(4, 48)
    return st.builds(
        TrainCase,
        lengths=st.lists(length, min_size=5, max_size=6, unique=True).map(tuple),
        rank=st.sampled_from((1, 3, 4, 8)),
        seed=st.integers(0, 2**31 - 1),
        prompt=st.integers(0, 2),
        head=st.sampled_from((True, False)),
    )


def trained_by(trainer, cases: Iterator[TrainCase]) -> Iterator[TrainCase]:
    """The cases as this trainer can take them: without an adapter on the head, where it knows none."""
    heads = getattr(trainer, "heads", False)
    return (dataclasses.replace(case, head=case.head and heads) for case in cases)


@dataclass(frozen=True)
class RowsCase:
    """Documents through one operation, the subject's number ``operation``.

    ``size`` scales x, ``garbage`` what stands in padding; ``place`` decides where in a longer stream a
    document lies.
    """

    operation: int
    lengths: tuple[int, ...]
    dtype: str
    size: float
    garbage: float
    place: int
    seed: int


def rows_cases(dtypes: tuple[str, ...]) -> st.SearchStrategy[RowsCase]:
    """Documents on both sides of the edges of tiles and of padding."""
    length = st.sampled_from((1, 2, 15, 16, 17, 31, 33, 63, 65, 100, 127, 128)) | st.integers(1, 128)
    return st.builds(
        RowsCase,
        operation=st.just(0),
        lengths=st.lists(length, min_size=3, max_size=3).map(tuple),
        dtype=st.sampled_from(dtypes),
        size=st.sampled_from((1.0, 1.0, 2.0**-6, 8.0)),
        garbage=st.sampled_from((1.0, 1.0, 2.0**-10)),
        place=st.integers(0, 2**16),
        seed=st.integers(0, 2**31 - 1),
    )


def cuts_of(count: int, seed: int) -> dict[str, Cut]:
    """Named cuts of ``count`` sequences: batch size x accumulation x order, uneven ones included."""
    every = tuple(range(count))
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    third = max(1, count // 3)
    return {
        "all": (every,),
        "one each": tuple((i,) for i in every),
        "pairs": tuple(every[i : i + 2] for i in range(0, count, 2)),
        "one each, reversed": tuple((i,) for i in reversed(every)),
        "uneven, shuffled": (tuple(mixed[:third]), tuple(mixed[third:])),
        "all, reversed": (every[::-1],),
    }


@dataclass(frozen=True)
class OptimizerCase:
    """Steps of AdamW on gradients of a stated size; ``zero_b``: B and all of A's first gradient are
    0."""

    hyper: Hyper
    size: float
    steps: int
    zero_b: bool
    seed: int

    def tensors(self) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """The parameters lora_A [5, 67] and lora_B [129, 5] before the first step, and each step's gradients."""
        pen = torch.Generator().manual_seed(self.seed)
        shapes = {"lora_A": (5, 67), "lora_B": (129, 5)}
        before = {name: torch.randn(shape, generator=pen) / 8 for name, shape in shapes.items()}
        gradients = [
            {name: torch.randn(shape, generator=pen) * self.size for name, shape in shapes.items()}
            for _ in range(self.steps)
        ]
        if self.zero_b:
            before["lora_B"].zero_()
            gradients[0]["lora_A"].zero_()
        return before, gradients


def optimizer_cases() -> st.SearchStrategy[OptimizerCase]:
    """Hyper-parameters, gradient sizes and numbers of steps."""
    hyper = st.builds(
        Hyper,
        lr=st.sampled_from((2e-4, 1e-3, 1e-5, 3e-2, 0.0)),
        betas=st.sampled_from(((0.9, 0.999), (0.9, 0.95), (0.5, 0.9))),
        eps=st.sampled_from((1e-8, 1e-6)),
        weight_decay=st.sampled_from((0.0, 0.0, 0.01, 0.1)),
        max_grad_norm=st.sampled_from((None, None, 1.0, 0.1)),
    )
    return st.builds(
        OptimizerCase,
        hyper=hyper,
        size=st.sampled_from((1.0, 1e-3, 1e-6, 30.0)),
        steps=st.integers(1, 4),
        zero_b=st.booleans(),
        seed=st.integers(0, 2**31 - 1),
    )


@contextlib.contextmanager
def _no_local_constants() -> Iterator[None]:
    """Keep hypothesis from mixing numbers of this repository's source into what it draws.

    It does so for every module imported so far, so that a list would change with what ran before it, and
    with every edit. There is no setting for it; a version without these names has nothing to switch off.
    """
    before = getattr(providers, "_get_local_constants", None)
    cache = getattr(getattr(providers, "CONSTANTS_CACHE", None), "cache", None)
    if before is None or cache is None:
        yield
        return
    none = providers.Constants()
    cache.clear()
    providers._get_local_constants = lambda: none
    try:
        yield
    finally:
        providers._get_local_constants = before
        cache.clear()


@functools.lru_cache(maxsize=64)
def ordered(strategy_name: str, names: tuple[str, ...], seed: int, count: int = 300) -> tuple:
    """The first ``count`` different cases of a strategy, in the order that ``seed`` fixes.

    ``strategy_name`` is "linear", "split", "rows", "train", "optimizer" or "adapter"; ``names`` are dtypes where it
    needs them. Always drawn whole, so that a budget only cuts the list and never changes it.
    """
    by_dtype = {"linear": linear_cases, "split": split_cases, "rows": rows_cases}
    others = {"train": train_cases, "optimizer": optimizer_cases, "adapter": adapter_cases}
    strategy = by_dtype[strategy_name](names) if strategy_name in by_dtype else others[strategy_name]()
    found: dict = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(case) -> None:
        found.setdefault(case)

    with _no_local_constants():
        collect()
    return tuple(found)


# What a kernel may be compiled for, and so what cases in a row can share.
COMPILED_FOR = ("k", "n", "r", "dtype")


def endless(strategy_name: str, names: tuple[str, ...], seed: int, a_shape: int = 1) -> Iterator:
    """The ordered list of ``seed``, and when that is used up those of further seeds derived from
    it.

    With ``a_shape`` above 1 that many cases in a row take features, rank and dtype from the first
    of them: for kernels that are compiled anew for each, which takes longer than to run them.
    """
    for again in itertools.count():
        for i, case in enumerate(ordered(strategy_name, names, seed + again * 1_000_003)):
            if i % a_shape == 0:
                shape = {name: getattr(case, name) for name in COMPILED_FOR if hasattr(case, name)}
            yield case if a_shape == 1 else dataclasses.replace(case, **shape)
