"""LoRA on the head in the fused loss by the kernels in the interpreter: against float64, and over splits."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import backend
from fastlora.ops import linear_cross_entropy as op
from tests.unit import head_cases as cases
from tests.unit.head_cases import TERMS, near, problem, run, truth

pytestmark = pytest.mark.interpreter

# Sums of the products' lengths (H, V, rows) with the softmax, the scales and the roundings between them.
ROUNDINGS = 32 + 150 + 150 + 100


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
@pytest.mark.parametrize(("dropout", "terms"), [(0.0, TERMS[0]), (0.25, TERMS[2])], ids=("plain", "dropout and terms"))
def test_linear_cross_entropy_with_lora_matches_float64(dropout, terms, exact):
    p = problem(150, vocabulary=150)
    weights = torch.rand(150, generator=torch.Generator().manual_seed(4)) + 0.5
    with backend.use("triton"):
        found = run(p, dropout=dropout, exact=exact, weights=weights, **terms)
    wanted = truth(p, dropout=dropout, weights=weights, **terms)
    for ours, theirs in zip(found[2:], wanted[2:]):
        assert near(ours, theirs, ROUNDINGS)
    left_out = truth(p._replace(b=torch.zeros_like(p.b)), weights=weights, **terms)
    assert not near(left_out.dh, wanted.dh, 1000 * ROUNDINGS)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_linear_cross_entropy_with_lora_sums_do_not_depend_on_the_split(dropout, monkeypatch):
    made = []
    # tiles of another size hold other chunks, and give the same sums
    for cut, rows in (([[0], [1], [2]], 2048), ([[2, 0, 1]], 2048), ([[2, 0, 1]], 128)):
        monkeypatch.setitem(op.TILE_ROWS, "cuda", rows)
        with backend.use("triton"):
            made += cases.units_and_totals([cut], (130, 20, 33), dropout)
    assert cases.same(made)
    assert all(total.any() for total in made[0][2])
