"""LoRA on the head inside the fused loss: right to rounding, exact over every split, and without the whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.errors import InputError, TrainingError
from fastlora.ops import linear_cross_entropy as op
from fastlora.ops.dropout import DropoutKey
from fastlora.ops.head_lora import HeadLora, places
from fastlora.token_sum import TokenSum
from tests.unit import head_cases as cases
from tests.unit.head_cases import TERMS, near, problem, run, truth

# Sums of the products' lengths (H, V, rows) with the softmax, the scales and the roundings between them.
ROUNDINGS = 32 + 50 + 150 + 100


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: " ".join(terms) or "plain")
def test_linear_cross_entropy_with_lora_within_rounding_of_float64(terms, dropout, exact, monkeypatch):
    monkeypatch.setattr(op, "VOCAB_ROWS", 16)
    op._vocabulary.cache_clear()
    p = problem(150)
    found, wanted = run(p, dropout=dropout, exact=exact, **terms), truth(p, dropout=dropout, **terms)
    op._vocabulary.cache_clear()
    assert abs(found.loss - wanted.loss) <= ROUNDINGS * 2.0**-24 * wanted.loss
    for ours, theirs in zip(found[2:], wanted[2:]):
        assert near(ours, theirs, ROUNDINGS)
    left_out = truth(p._replace(b=torch.zeros_like(p.b)), **terms)
    assert not near(left_out.dh, wanted.dh, 1000 * ROUNDINGS)


def test_linear_cross_entropy_with_lora_in_bfloat16():
    p = problem(150, dtype=torch.bfloat16)
    found, wanted = run(p, exact=True), truth(p)
    # A few roundings to 8 bits (S, dS, dh), whose errors do not add up over a sum.
    for ours, theirs in zip(found[2:], wanted[2:]):
        assert near(ours, theirs, 4, unit=2.0**-8)


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
def test_linear_cross_entropy_with_lora_weighs_rows_and_scales_gradients(exact):
    p, weights = problem(90), torch.rand(90, generator=torch.Generator().manual_seed(4)) + 0.5
    wanted = truth(p, weights=weights)
    found = run(p, exact=exact, weights=weights, gradient_scale=4.0, upstream=4.0)
    assert found.loss == run(p).loss  # the value is not weighed: who asks for weights knows the documents' losses
    for ours, theirs in zip(found[2:], wanted[2:]):
        assert near(ours / 4.0, theirs, ROUNDINGS)


def test_linear_cross_entropy_with_lora_follows_what_comes_from_above_in_grad_mode():
    p = problem(40)
    plain, twice = run(p), run(p, upstream=2.0)
    for once, double in zip(plain[2:], twice[2:]):
        assert torch.equal(double, once * 2.0)


@pytest.mark.parametrize(
    ("upstream", "words"), [(3.0, "another number than its gradient_scale"), (float("nan"), "NaN")]
)
def test_linear_cross_entropy_with_lora_refuses_exact_sums_of_another_scale(upstream, words):
    with pytest.raises(TrainingError, match=words):
        run(problem(40), exact=True, upstream=upstream)


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
def test_linear_cross_entropy_with_lora_on_a_hidden_state_that_wants_no_gradient(exact):
    p = problem(90)
    whole, alone = run(p, exact=exact), run(p, exact=exact, freeze=True)
    assert alone.dh is None
    assert torch.equal(whole.da, alone.da) and torch.equal(whole.db, alone.db)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]], ids=("plain", "all"))
def test_linear_cross_entropy_with_lora_sums_do_not_depend_on_the_split(terms, dropout):
    before, cuts = torch.get_num_threads(), ([[0], [1], [2]], [[0, 1, 2]], [[2, 0, 1]], [[1, 2], [0]])
    made = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made += cases.units_and_totals(cuts, (150, 20, 33), dropout, terms)
    finally:
        torch.set_num_threads(before)
    assert cases.same(made)
    assert all(total.any() for total in made[0][2])


def test_linear_cross_entropy_with_lora_in_grad_mode_does_not_depend_on_threads():
    p, before, found = problem(1500, vocabulary=40), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(run(p))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0][2:], other[2:]))


class Widest(TorchDispatchMode):
    """The most rows that a tensor of ``columns`` columns had, in or out."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (*args, *(out if isinstance(out, (tuple, list)) else [out])):
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == self.columns:
                self.rows = max(self.rows, t.shape[0])
        return out


@pytest.mark.parametrize("exact", [False, True], ids=("grad", "exact"))
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_linear_cross_entropy_with_lora_never_holds_the_whole_logits(dropout, exact):
    p = problem(400, vocabulary=77)
    before, widest = torch.get_num_threads(), Widest(77)
    try:
        torch.set_num_threads(1)  # the tiles run on this thread, where the mode sees them
        with widest:
            run(p, dropout=dropout, exact=exact)
    finally:
        torch.set_num_threads(before)
    assert 0 < widest.rows <= op.TILE_ROWS["cpu"] < int((p.labels != -100).sum())


def test_linear_cross_entropy_with_lora_without_a_supervised_row():
    p = problem(20)
    found = run(p._replace(labels=torch.full_like(p.labels, -100)), exact=True)
    assert found.loss == 0.0
    assert not (found.dh.any() or found.da.any() or found.db.any())


def test_places_put_whole_chunks_of_one_document_into_each_tile():
    counts = (70, 0, 1100, 3)
    owner = torch.tensor([0] * 70 + [2] * 1100 + [3] * 3)
    found = places(counts, owner, 1024)
    # 70 -> 128 rows, 1100 -> 512 + 512 + 128, 3 -> 64
    assert found.total == 128 + 1152 + 64
    assert found.tiles == [(0, 640), (640, 1344)]
    assert found.spans == [((0, 128), (128, 640)), ((0, 512), (512, 640), (640, 704))]
    assert found.rows.tolist() == [*range(70), *range(128, 1228), *range(1280, 1283)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"a": torch.zeros(4, 31)}, r"\[r, 32\]"),
        ({"b": torch.zeros(49, 4)}, r"\[50, r\]"),
        ({"dropout": 0.5}, "key"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": 0.5, "key": DropoutKey(0, torch.arange(3))}, "key"),
        ({"weights": torch.ones(3)}, "weights"),
        ({"gradient_scale": 3.0}, "gradient_scale is 3.0"),
        ({"gradient_scale": float("inf")}, "gradient_scale"),
    ],
)
def test_linear_cross_entropy_with_lora_refuses_by_name(change, named):
    p = problem(4)
    with pytest.raises(InputError, match=named):
        op.linear_cross_entropy(p.hidden, p.weight, p.labels, lora=HeadLora(p.a, p.b, 1.0)._replace(**change))


def test_linear_cross_entropy_with_lora_refuses_a_block_that_has_ended():
    p = problem(40)
    sums = (TokenSum(p.a.shape), TokenSum(p.b.shape))
    lora = HeadLora(p.a.requires_grad_(), p.b.requires_grad_(), 1.0, sums=sums)
    loss, _ = op.linear_cross_entropy(p.hidden, p.weight, p.labels, lora=lora)
    sums[0].accepting = False
    with pytest.raises(TrainingError, match="block has ended"):
        loss.backward()
