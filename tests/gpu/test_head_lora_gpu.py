"""LoRA on the head in the fused loss by the kernels on a GPU: against float64, over splits, and without the whole logits."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import linear_cross_entropy as op
from tests.unit import head_cases as cases
from tests.unit.head_cases import TERMS, near, problem, run, truth

pytestmark = pytest.mark.gpu

# fp32: lengths of the sums (H, V, rows) and what lies between; 16 bits: logits, dlogits, S, dS and dh are rounded, and their
# errors do not add up over a sum.
ROUNDINGS = {torch.float32: (64 + 1000 + 1500 + 100, 2.0**-24), torch.bfloat16: (4, 2.0**-8)}


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize(("dropout", "terms"), [(0.0, TERMS[0]), (0.25, TERMS[2])], ids=("plain", "dropout and terms"))
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=lambda d: str(d)[6:])
def test_linear_cross_entropy_with_lora_matches_float64(dtype, dropout, terms, rank, exact):
    p = problem(1500, width=64, vocabulary=1003, rank=rank, dtype=dtype, device="cuda")
    weights = torch.rand(1500, generator=torch.Generator().manual_seed(4)).cuda() + 0.5
    found = run(p, dropout=dropout, exact=exact, weights=weights, gradient_scale=4.0, upstream=4.0, **terms)
    wanted = truth(p, dropout=dropout, weights=weights, **terms)
    for ours, theirs in zip(found[2:], wanted[2:]):
        assert near(ours / 4.0, theirs, *ROUNDINGS[dtype])
    left_out = truth(p._replace(b=torch.zeros_like(p.b)), weights=weights, **terms)
    assert not near(left_out.dh, wanted.dh, *ROUNDINGS[dtype])


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_linear_cross_entropy_with_lora_sums_do_not_depend_on_the_split(dropout, rank, monkeypatch):
    shape = dict(width=256, vocabulary=5003, rank=rank, dtype=torch.bfloat16, device="cuda")
    cuts = ([[0], [1], [2], [3]], [[0, 1, 2, 3]], [[3, 1, 0, 2]], [[1, 2], [3, 0]])
    made = []
    for rows in (2048, 512, 128):  # tiles of another size hold other chunks, and give the same sums
        monkeypatch.setitem(op.TILE_ROWS, "cuda", rows)
        made += cases.units_and_totals(cuts, (1500, 20, 333, 2100), dropout, TERMS[2], 64, **shape)
    assert cases.same(made)
    assert all(total.any() for total in made[0][2])


def test_linear_cross_entropy_with_lora_never_holds_the_whole_logits():
    p = problem(8192, width=64, vocabulary=32000, dtype=torch.bfloat16, device="cuda")
    run(p, exact=True)  # kernels compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(p, exact=True)
    whole = int((p.labels != -100).sum()) * 32000 * 2
    # a tile of logits, its partials of dS, the sums
    assert torch.cuda.max_memory_allocated() - before < 0.9 * whole
