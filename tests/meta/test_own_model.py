"""``--claim splits --model``: the cuts, the refusals, one adapter for all cuts, and the operation that parts them."""

from __future__ import annotations

import json
import random

import pytest
from test_verify_command import command

from tests.unit.tiny_run import save_model
from verify import own_model
from verify.claims.outcome import Outcome
from verify.subject import BadSubject

CUTS = {"1x4": ((0, 1, 2, 3),), "4x1": ((0,), (1,), (2,), (3,))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    save_model(place / "model")
    draw, words = random.Random(0), ["one", "two", "three", "hello", "world"]
    texts = [" " + " ".join(draw.choices(words, k=3 + 4 * i)) for i in range(6)]
    rows = [{"prompt": "the answer is", "completion": text} for text in texts]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


@pytest.fixture
def subject(folder):
    return own_model.load(str(folder / "model"), str(folder / "rows.jsonl"), "cpu", CUTS)


def judged(subject, cuts=CUTS) -> Outcome:
    out = Outcome("splits", "", "own")
    own_model.judge(subject, cuts, out)
    return out


def test_cuts_from_reads_micro_batches_times_sequences():
    cuts = own_model.cuts_from("1x4, 2x2,4x1")
    assert cuts == {"1x4": ((0, 1, 2, 3),), "2x2": ((0, 1), (2, 3)), "4x1": ((0,), (1,), (2,), (3,))}


@pytest.mark.parametrize("text", ["", "8", "1x8", "1x8,1x8", "0x8,8x0", "1x8,2x3", "axb,1x8", "1x8;8x1"])
def test_cuts_from_refuses_what_are_no_cuts_of_one_batch(text):
    with pytest.raises(BadSubject, match="--splits: .*; allowed are"):
        own_model.cuts_from(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": None}, "--data: missing"),
        ({"model": "nowhere"}, "--model: 'nowhere'; allowed is a folder that exists"),
        ({"data": "nothing.jsonl"}, "--data: 'nothing.jsonl'; allowed is a file that exists"),
        ({"claims": ["updates"]}, "--claim: updates; allowed beside --model is splits"),
        ({"others": {"--cases": 3}}, "--cases: 3; not allowed beside --model"),
    ],
)
def test_check_refuses_before_anything_is_loaded(folder, change, told):
    good = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "claims": None, "others": {}}
    assert len(own_model.check(text=None, **good)) == 3
    with pytest.raises(BadSubject, match=told):
        own_model.check(text=None, **{**good, **change})


def test_verify_refuses_an_own_model_in_one_line(folder, tmp_path):
    done = command("--model", str(folder / "model"), "--data", "nothing.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == "--data: 'nothing.jsonl'; allowed is a file that exists"
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_fewer_rows_than_a_batch_and_what_the_trainer_refuses(folder):
    rows = str(folder / "rows.jsonl")
    with pytest.raises(BadSubject, match="has 6 rows; --splits asks for 7 a batch"):
        own_model.load(str(folder / "model"), rows, "cpu", own_model.cuts_from("1x7,7x1"))
    with pytest.raises(BadSubject, match="no config.json"):
        own_model.load(str(folder), rows, "cpu", CUTS)


def test_run_gives_one_adapter_for_all_cuts_and_shows_the_controls(subject):
    (outcome,) = own_model.run(subject, CUTS)
    assert outcome.failures == []
    assert outcome.cases == 2
    digests = [note.partition(": ")[2] for note in outcome.notes if note.startswith(("1x4", "4x1"))]
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert any(note.startswith("control: float sums") for note in outcome.notes)
    assert any("PEFT" in note for note in outcome.notes)
    assert {"cpu", "fp32"} <= outcome.tags


def test_judge_names_the_tensor_and_the_operation_that_parts_two_cuts(subject):
    norm = subject.model.model.layers[1].input_layernorm
    own = norm.forward
    norm.forward = lambda x: own(x + x.mean(1, keepdim=True) / 64)
    told = judged(subject).failures[0]
    assert "1x4 and 4x1 differ after step 1, first in base_model.model.model.layers.0" in told
    assert "the output of layers.1.input_layernorm" in told
    assert "the last that agrees is the input of layers.1.input_layernorm" in told


def test_judge_names_the_sum_when_every_sequence_agrees(subject):
    exactly = subject.train
    subject.train = lambda cut, **keywords: exactly(cut, **{**keywords, "float_sums": True})
    told = judged(subject, own_model.cuts_from("1x4,2x2")).failures[0]
    assert "it is the sum over tokens that differs" in told


def test_judge_sees_an_adapter_that_stands_still_and_a_cut_that_did_not_run(subject):
    own = subject.train
    subject.train = lambda cut, **keywords: own(CUTS["1x4"], **keywords)
    assert any("4x1 ran forwards of" in told for told in judged(subject).failures)
    still = own_model.ModelRun([{n: own_model.md5_of_tensor(t) for n, t in subject.start.items()}], ((1,),))
    subject.train = lambda cut, **keywords: still
    assert any("did not move" in told for told in judged(subject).failures)


def test_first_apart_is_the_earliest_step_in_the_models_order():
    one = own_model.ModelRun([{"a": "1", "b": "2"}, {"a": "3", "b": "4"}], ())
    two = own_model.ModelRun([{"a": "1", "b": "2"}, {"a": "3", "b": "5"}], ())
    assert own_model.first_apart(one, two) == (1, "b")
    assert own_model.first_apart(one, one) is None


def test_run_tells_a_crash_of_the_subject_as_a_failure(subject):
    def crashes(cut, **keywords):
        raise RuntimeError("no kernel image")

    subject.train = crashes
    (outcome,) = own_model.run(subject, CUTS)
    assert outcome.failures == ["raised RuntimeError: no kernel image"]
