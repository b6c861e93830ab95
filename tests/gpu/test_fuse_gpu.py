"""The fused decoder layer on a GPU: every family in 16 bits, one sum for every split, one file for every cut of a training run."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fastlora import exact
from fastlora.fuse import fuse
from tests.fuse_cases import FAMILIES, build, run
from tests.unit.tiny_run import tiny_model, train

pytestmark = pytest.mark.gpu


def on_gpu(family: str, dropout: float, layers: int = 2) -> torch.nn.Module:
    return build(family, dropout, layers).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_gives_one_sum_for_every_split_of_every_family(family):
    found = {}
    for dropout in (0.0, 0.2):
        for name, cuts in {"all": ((0, 1, 2),), "each": ((2,), (0,), (1,)), "two": ((1, 0), (2,))}.items():
            model = on_gpu(family, dropout)
            handle = fuse(model, checkpoint_every=2 if name == "two" else 0)
            assert len(handle.layers) == 2 and not handle.refused, handle.refused
            with exact(model):
                rows = [run(model, cut, "triton")[0] for cut in cuts]
            assert all(bool(r.isfinite().all()) for r in rows)
            found[dropout, name] = [s.total.clone() for m in model.modules() if getattr(m, "sums", None) for s in m.sums]
        assert all(
            torch.equal(a, b) for name in ("each", "two") for a, b in zip(found[dropout, "all"], found[dropout, name], strict=True)
        )
    assert any(not torch.equal(a, b) for a, b in zip(found[0.0, "all"], found[0.2, "all"]))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trainer_writes_one_file_for_every_cut_on_a_gpu(tmp_path, dropout):
    digests, counts = set(), set()
    for tokens in (256, 512, 4096):
        lora = {"lora_dropout": dropout, "r": 8}
        model = tiny_model().to("cuda", torch.bfloat16)
        result, _, out = train(tmp_path, f"cut-{tokens}", model=model, micro_batch_tokens=tokens, lora=lora, steps=3, batch_size=8)
        digests.add(hashlib.md5((tmp_path / f"cut-{tokens}" / "adapter_model.safetensors").read_bytes()).hexdigest())
        counts.add(tuple(len(line["micro_batches"]) for line in result.log))
        assert "layers: " in out and "exact under splitting: on this GPU" in out
    assert len(digests) == 1 and len(counts) > 1
