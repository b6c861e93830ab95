"""The adapter that a committed set of rows gives on a GPU: equal between runs and between machines of one kind.

``digests.json`` beside this file holds what was found, keyed by GPU, versions and data: a new key is recorded there (commit it), an old
one must match. Nothing is promised between keys.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

import pytest
import torch
import transformers

from fastlora.data import make_row
from fastlora.files import atomic_write
from tests import split_cases as cases
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

ROWS = pathlib.Path(__file__).parents[1] / "data" / "rows.jsonl"
RECORD = pathlib.Path(__file__).parent / "digests.json"
ADAPTERS = {"r8": dict(r=8), "r64 rslora dropout": dict(r=64, use_rslora=True, lora_dropout=0.1)}
STEPS = 3


def key() -> str:
    import triton

    data = hashlib.md5(ROWS.read_bytes()).hexdigest()[:12]
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}, rows {data}"
    )


def read_rows():
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return [
        make_row(line["ids"], [i >= line["prompt"] for i in range(len(line["ids"]))], number, "text")
        for number, line in enumerate(lines, 1)
    ]


def found() -> dict[str, str]:
    digests = {}
    for name, lora in ADAPTERS.items():
        subject = cases.Subject(tiny_model("llama", max_position_embeddings=512).to("cuda", torch.bfloat16), **lora)
        digests[name] = cases.check(subject, read_rows(), cases.FEW[:3], steps=STEPS).digest
    return digests


def test_digests_are_those_of_every_machine_of_this_kind():
    assert len(read_rows()) == STEPS * cases.ROWS
    digests = found()
    assert digests == found()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if key() in record:
        assert digests == record[key()]
        return
    with atomic_write(RECORD) as part:
        part.write_text(json.dumps({**record, key(): digests}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
