"""The wrong ways in which trainers divided gradients: each is told by its name, and the right one is none."""

from __future__ import annotations

import dataclasses

import pytest

from verify import subjects, ways
from verify.claims import splits
from verify.claims.outcome import Outcome
from verify.mutants.base import Wrapped
from verify.strategies import cuts_of
from verify.subject import Cut, TrainCase, TrainHooks
from verify.tiny import supervised

CASE = TrainCase(lengths=(4, 9, 6, 12, 7), steps=1, rank=1, seed=5, hidden=16)


def padded(case: TrainCase, cut: Cut) -> float:
    return sum(max(case.lengths[i] + 1 for i in group) * len(group) for group in cut)


def mean_of_means(case, cut):
    return TrainHooks(weigh=lambda loss, n: loss / max(n, 1), tokens=lambda n, cut: len(cut))


WRONG = {
    "mean of means": mean_of_means,
    "padding counted": lambda case, cut: TrainHooks(tokens=lambda n, cut: padded(case, cut)),
    "short last micro-batch: left out": lambda case, cut: TrainHooks(order=lambda cut: cut[:-1] or cut),
    "short last micro-batch: divided as if it were full": lambda case, cut: TrainHooks(
        tokens=lambda n, cut: n * max(len(cut) * len(cut[0]), len(case.lengths)) / len(case.lengths)
    ),
    "prompt tokens counted": lambda case, cut: TrainHooks(tokens=lambda n, cut: sum(case.lengths)),
    "counted before the shift": lambda case, cut: TrainHooks(
        tokens=lambda n, cut: n + sum(case.prompt == 0 and supervised(case, i) > 0 for i in range(len(case.lengths)))
    ),
    "divided twice across processes": lambda case, cut: TrainHooks(tokens=lambda n, cut: 2 * n),
    "divided by accumulation once more": lambda case, cut: TrainHooks(tokens=lambda n, cut: n * len(cut)),
    "not divided": lambda case, cut: TrainHooks(tokens=lambda n, cut: 1),
}


@pytest.fixture(scope="module")
def trainer():
    return subjects.built_in("cpu")[0].trainer


@pytest.fixture(scope="module", autouse=True)
def once():
    """The float64 gradients of a case are the same whatever is planted: computed once for all tests."""
    real, kept = ways.sequences, {}

    def sequences(case, before, alignment):
        if case not in kept:
            kept[case] = real(case, before, alignment)
        return kept[case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "sequences", sequences)
        yield


def tried(trainer, hooks) -> Outcome:
    def train(case, cut, **keywords):
        return trainer.train(case, cut, hooks=hooks(case, cut) if hooks else None)

    out = Outcome("splits", "", "planted")
    splits._named_way(Wrapped(trainer, train=train), CASE, cuts_of(5, 11), out, "here")
    return out


@pytest.mark.parametrize("way", WRONG)
def test_named_way_tells_each_wrong_way_by_its_name(trainer, way):
    (told,) = tried(trainer, WRONG[way]).failures
    assert told.startswith(f"divided wrongly: {way}")


def test_named_way_passes_the_mean_over_supervised_tokens(trainer):
    out = tried(trainer, None)
    assert out.failures == []
    # fp32 against float64: a hundredth of half a token would be a hundred times what rounding does
    assert out.worst < 0.01


def test_named_way_says_so_when_no_known_way_fits(trainer):
    (told,) = tried(trainer, lambda case, cut: TrainHooks(tokens=lambda n, cut: 1.5 * n)).failures
    assert "no known way gives them" in told


def test_sequences_see_the_prompt_and_a_masked_sequence(trainer):
    case = dataclasses.replace(CASE, prompt=2, masked=(1,))
    before = trainer.train(case, ((0,),)).before
    found = ways.sequences(case, before, 16)
    assert found.supervised.tolist() == [3, 0, 5, 11, 6]
    assert not bool(found.own[1].any())
    assert bool((found.own[0] != found.whole[0]).any())
