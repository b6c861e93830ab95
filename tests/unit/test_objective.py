"""The loss a run trains on: smoothing and z-loss by both of its ways, in a run, and never in the held-out loss."""

from __future__ import annotations

import pytest

from fastlora import packing, rundir, stream
from fastlora.data import read_rows
from fastlora.setup import Objective
from tests.unit.loss_reference import reference
from tests.unit.rounding import within
from tests.unit.tiny_run import tiny_model, train, write_rows
from tests.unit.tiny_tokenizer import make_tokenizer

TERMS = {"label_smoothing": 0.2, "z_loss": 1e-2}


@pytest.mark.parametrize("terms", [{}, TERMS], ids=("plain", "terms"))
@pytest.mark.parametrize("known", [True, False], ids=("known head", "logits"))
def test_objective_is_the_sum_that_its_terms_say(tmp_path, known, terms):
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", 3), make_tokenizer(), max_length=512).rows
    batch = packing.collate(rows, packing.sample_ids(rows), 16)
    model = tiny_model().requires_grad_(False)
    objective, seen = Objective(model, **terms), []

    def keep(_module, _inputs, output):
        output.requires_grad_().retain_grad()
        seen.append(output)

    assert objective.head is not None
    if not known:
        objective.head = None
    model.model.norm.register_forward_hook(keep)
    with stream.use(batch.stream):
        loss = objective(batch)
        loss.total.backward()
    hidden, gradient = seen[0][0].detach(), seen[0].grad[0]
    wanted = reference(hidden, model.lm_head.weight, batch.labels, **terms)
    # torch adds the rows' losses in fp32 where it is given the logits
    bound = wanted.loss_bound + wanted.loss * 2.0**-24 * batch.supervised
    assert abs(loss.total.item() - wanted.loss) <= bound
    assert abs(loss.documents.sum().item() - wanted.loss) <= bound
    assert within(gradient, wanted.gradient, wanted.gradient_bound)
    with stream.use(batch.stream):
        assert (objective.plain()(batch).total.item() == loss.total.item()) is (known and not terms)


def test_trainer_with_smoothing_and_z_loss_gives_one_adapter_for_every_cut(tmp_path):
    held = str(write_rows(tmp_path / "held.jsonl", 3, seed=9))
    settings = {"steps": 2, "eval_data": held}
    plain, *_ = train(tmp_path, "plain", **settings)
    found = [train(tmp_path, f"cut{cut}", micro_batch_tokens=cut, **settings, **TERMS)[0] for cut in (160, 4096)]
    assert found[0].digest == found[1].digest != plain.digest
    assert found[0].losses == found[1].losses
    assert found[0].losses[0][1] > plain.losses[0][1]
    assert found[0].held_out[0] == plain.held_out[0]  # before training: the plain cross-entropy in both
    stored = rundir.read_run(tmp_path / "cut160")["train"]
    assert {name: stored[name] for name in TERMS} == TERMS
