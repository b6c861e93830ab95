"""Rows of a task are encoded as each would be alone."""

from __future__ import annotations

import json

import pytest

from fastlora import shapes, sources, tokenizing
from fastlora.token_rows import make_row
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer

WORDS = ["hello wor", "ld", "one", " two", "é世", "", "😀 x", "<|end|>", "the answer"]


def records(shape: str) -> list[dict]:
    pairs = [(a, b) for a in WORDS for b in WORDS if b.strip()]
    if shape == "text":
        return [{"text": a + b} for a, b in pairs]
    if shape == "prompt-completion":
        return [{"prompt": a, "completion": b} for a, b in pairs]
    if shape == "instruction":
        return [{"instruction": a, "input": b, "output": b} for a, b in pairs]
    return [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}] * 2} for a, b in pairs if "<" not in b]


@pytest.mark.parametrize("shape", ["text", "prompt-completion", "instruction", "messages"])
def test_encode_task_gives_what_each_row_alone_gives(tmp_path, shape):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE if shape == "messages" else None)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records(shape)) + '{"text": 3}\n[1]\n{"prompt": "\\ud800", "completion": "x"}\n')
    (task,) = sources.tasks([path])
    piece = tokenizing.encode_task(task, tokenizing.Encoding(tokenizer, shape, None, "refuse"))
    assert len(piece.problems) == 3
    starts = [0, *piece.index["end"][:-1]]
    for record, start, entry in zip(records(shape), starts, piece.index, strict=True):
        row = make_row(*shapes.encode_record(record, tokenizer), 0, shape)
        assert piece.ids[start : entry["end"]].tolist() == row.input_ids.tolist()
        assert piece.mask[start : entry["end"]].tolist() == (row.labels >= 0).tolist()
        assert entry["key"] == row.key


def test_rows_known_before_reach_the_tokenizer_in_one_call(tmp_path):
    calls = []

    class Counting(tokenizing.Ahead):
        def __call__(self, texts, **options):
            calls.append(len(texts))
            return self._tokenizer(texts, **options)

    tokenizer = Counting(make_tokenizer(), [])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hello wor", "completion": "ld"}\n{"prompt": "one", "completion": " two"}\n')
    (task,) = sources.tasks([path])
    tokenizing.encode_task(task, tokenizing.Encoding(tokenizer, "prompt-completion", None, "refuse"))
    assert calls == [4, 1]  # prompts with wholes, then the completion at whose border a token would span
