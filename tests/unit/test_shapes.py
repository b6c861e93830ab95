"""The shapes of rows that people have, and what each is trained as."""

from __future__ import annotations

import json

import pytest

from fastlora import data, shapes
from fastlora.encode import RowError
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer

CHAT = [{"role": "system", "content": "hello"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "world"}]
SHAREGPT = [{"from": "system", "value": "hello"}, {"from": "human", "value": "one"}, {"from": "gpt", "value": "two"},
            {"from": "human", "value": "three"}, {"from": "gpt", "value": "world"}]


def read(tmp_path, tokenizer, *records):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return data.read_rows(path, tokenizer)


def ids(found) -> list[list[int]]:
    return [row.labels.tolist() for row in found.rows]


def test_sharegpt_is_the_same_chat(tmp_path):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    wanted = ids(read(tmp_path, tokenizer, {"messages": CHAT}))
    for record in ({"conversations": SHAREGPT, "id": "x"}, {"conversations": CHAT},
                   {"conversations": SHAREGPT[1:], "system": "hello"}):
        found = read(tmp_path, tokenizer, record)
        assert ids(found) == wanted
        assert (found.format, found.shape) == ("messages", "conversations")
        assert "ShareGPT" in found.summary()


@pytest.mark.parametrize("conversations, says", [
    ("one", "'conversations' is a string"), ([3], "turn 1 is a number"), ([], "at least one message"),
    ([{"from": "narrator", "value": "x"}], "turn 1 is from 'narrator'; known are human"),
    ([{"from": "human", "value": "x"}, {"from": "gpt", "value": None}], "content of message 2.* is null"),
])
def test_sharegpt_faults_name_the_turn(tmp_path, conversations, says):
    with pytest.raises(InputError, match=f"line 1: .*{says}"):
        read(tmp_path, make_tokenizer(PLAIN_TEMPLATE), {"conversations": conversations})


def test_alpaca_is_a_chat_where_there_is_a_template(tmp_path):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    found = read(tmp_path, tokenizer, {"instruction": "one", "input": "two", "output": "three"},
                 {"instruction": "one", "input": "", "output": "three"},
                 {"instruction": "three", "output": "world", "system": "hello", "history": [["one", "two"]]})
    user = [{"role": "user", "content": c} for c in ("one\n\ntwo", "one")]
    answer = {"role": "assistant", "content": "three"}
    assert ids(found) == ids(read(tmp_path, tokenizer, {"messages": [user[0], answer]}, {"messages": [user[1], answer]},
                                  {"messages": CHAT}))
    assert (found.format, found.shape) == ("messages", "instruction")
    assert "Alpaca, as a chat" in found.summary()


def test_alpaca_has_its_own_prompt_without_a_template(tmp_path):
    tokenizer = make_tokenizer()
    found = read(tmp_path, tokenizer, {"instruction": "one", "input": "two", "output": "three"})
    text = tokenizer.decode(found.rows[0].input_ids)
    assert text.startswith("<|start|>Below is an instruction that describes a task, paired with an input that")
    assert text.endswith("### Instruction:\none\n\n### Input:\ntwo\n\n### Response:\nthree<|end|>")
    assert found.format == "prompt-completion" and "by Alpaca's prompt" in found.summary()
    assert "### Input" not in shapes.alpaca_pair({"instruction": "one", "output": "x"})[0]
    with pytest.raises(InputError, match="line 1: 'history' has no place in Alpaca's prompt"):
        read(tmp_path, tokenizer, {"instruction": "one", "output": "x", "history": [["a", "b"]]})


@pytest.mark.parametrize("record, says", [
    ({"instruction": "a", "input": "b"}, "no 'output'"), ({"instruction": 3, "output": "b"}, "'instruction' is a number"),
    ({"instruction": "a", "output": "b", "input": [1]}, "'input' is a list"), ({"instruction": "a", "output": ""}, "'output' is empty"),
    ({"instruction": "a", "output": "b", "text": "c"}, "more than one format"),
])
def test_alpaca_faults_are_named(tmp_path, record, says):
    with pytest.raises(InputError, match=f"line 1: .*{says}"):
        read(tmp_path, make_tokenizer(), record)


def test_shape_of_takes_the_one_that_is_complete():
    assert shapes.shape_of({"prompt": "a", "prompt_id": "b", "messages": CHAT}) == "messages"
    assert shapes.shape_of({"input": "x", "text": "a"}) == "text"
    with pytest.raises(RowError, match="no known field"):
        shapes.shape_of({"input": "x"})
