"""The whole promise on CPU: one MD5 of the adapter file for every way to cut each global batch."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from tiny_run import train, write_rows

from fastlora.blocks import single_thread

# Padded tokens: the longest row alone, about two, five, all rows of a batch in one forward.
CUTS = (160, 192, 320, 4096)


def md5(folder, name):
    return hashlib.md5((folder / name / "adapter_model.safetensors").read_bytes()).hexdigest()


def micro_batches(folder, name):
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    return [len(json.loads(line)["micro_batches"]) for line in lines]


def reordered(folder, batch=6):
    """The same rows in another order inside each global batch."""
    lines = write_rows(folder / "rows.jsonl").read_text().splitlines()
    rng, paths = random.Random(1), []
    for name in ("reversed", "drawn"):
        out = []
        for start in range(0, len(lines), batch):
            part = lines[start : start + batch]
            out += part[::-1] if name == "reversed" else rng.sample(part, len(part))
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(out) + "\n")
    return paths


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_train_gives_one_md5_for_every_cut_order_and_thread_count(tmp_path, dropout):
    orders = reordered(tmp_path)
    runs = [(f"cut-{cut}", {"micro_batch_tokens": cut}, 2) for cut in CUTS]
    runs += [(path.stem, {"data": path, "micro_batch_tokens": 240}, 2) for path in orders]
    runs += [("one-thread", {"micro_batch_tokens": 400}, 1), ("four-threads", {"micro_batch_tokens": 400}, 4)]
    before, results = torch.get_num_threads(), {}
    try:
        for name, settings, threads in runs:
            torch.set_num_threads(threads)
            result, *_ = train(tmp_path, name, lora={"lora_dropout": dropout}, shuffle=False, **settings)
            results[name] = result
    finally:
        torch.set_num_threads(before)
    assert len({md5(tmp_path, name) for name in results}) == 1
    assert len({result.digest for result in results.values()}) == 1
    # The losses of the log are exact too.
    assert len({tuple(result.losses) for result in results.values()}) == 1
    cuts = {tuple(micro_batches(tmp_path, f"cut-{cut}")) for cut in CUTS}
    assert len(cuts) == len(CUTS)
    assert max(micro_batches(tmp_path, "cut-4096")) == 1
    moved = results[f"cut-{CUTS[0]}"].report["tensors"]
    assert moved and not any(row["equal"] for row in moved)


def test_train_digest_depends_on_dropout_and_on_the_step(tmp_path):
    plain, *_ = train(tmp_path, "plain")
    dropped, *_ = train(tmp_path, "dropped", lora={"lora_dropout": 0.1})
    assert plain.digest != dropped.digest


def test_train_with_float_sums_gives_several_digests(tmp_path):
    digests = set()
    for cut in CUTS:
        result, *_ = train(tmp_path, f"float-{cut}", float_sums=True, micro_batch_tokens=cut)
        digests.add(result.digest)
    assert len(digests) > 1


def test_train_is_the_same_in_an_outer_single_thread_block(tmp_path):
    one, *_ = train(tmp_path, "one")
    with single_thread():
        two, *_ = train(tmp_path, "two")
    assert one.digest == two.digest
