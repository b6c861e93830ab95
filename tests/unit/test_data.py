"""Rows from JSONL: formats, labels, and every kind of bad line counted and named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastlora import data, encode
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer

PAIR = {"prompt": "one two ", "completion": "three"}
CHAT = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


def write(tmp_path, *lines) -> str:
    """A JSONL file; bytes are written as they are, other values as JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(raw) + b"\n")
    return str(path)


def supervised_text(row, tokenizer) -> str:
    return tokenizer.decode(row.labels[row.labels != data.IGNORED])


def test_read_rows_supervises_completion_and_end_token(tmp_path):
    tokenizer = make_tokenizer()
    rows = data.read_rows(write(tmp_path, PAIR), tokenizer)
    (row,) = rows.rows
    assert tokenizer.decode(row.input_ids) == "<|start|>one two three<|end|>"
    assert supervised_text(row, tokenizer) == "three<|end|>"
    assert row.input_ids.dtype == row.labels.dtype == np.int32
    on = row.labels != data.IGNORED
    assert (row.labels[on] == row.input_ids[on]).all()
    assert not on[0]
    assert (rows.format, row.line) == ("prompt-completion", 1)
    assert rows.counts["supervised"] == row.supervised == int(on.sum())
    assert rows.counts["without_end"] == 0


@pytest.mark.parametrize("bos", [True, False])
def test_read_rows_prompt_has_the_ids_of_generation(tmp_path, bos):
    tokenizer = make_tokenizer(bos=bos)
    # "wor" + "ld": a merge of the joined text would span the border.
    for prompt, completion in (("hello wor", "ld"), ("<|start|>one", " two"), ("one\n", "two")):
        row = data.read_rows(
            write(tmp_path, {"prompt": prompt, "completion": completion}), tokenizer
        ).rows[0]
        head = encode.prompt_ids(tokenizer, prompt)
        assert row.input_ids[: len(head)].tolist() == head
        assert (row.labels[: len(head)] == data.IGNORED).all()
        assert supervised_text(row, tokenizer) == completion + "<|end|>"
        begins = (row.input_ids == tokenizer.convert_tokens_to_ids("<|start|>")).sum()
        assert begins == (1 if bos or prompt.startswith("<|start|>") else 0)


def test_read_rows_does_not_double_the_end_token(tmp_path):
    tokenizer = make_tokenizer()
    path = write(tmp_path, {"prompt": "one", "completion": "two<|end|>"})
    row = data.read_rows(path, tokenizer).rows[0]
    assert (row.input_ids == tokenizer.eos_token_id).sum() == 1


def test_read_rows_text_supervises_all_but_the_first_token(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    row = data.read_rows(write(tmp_path, {"text": "one two"}), tokenizer).rows[0]
    assert tokenizer.decode(row.input_ids) == "one two<|end|>"
    assert row.labels[0] == data.IGNORED
    assert (row.labels[1:] == row.input_ids[1:]).all()


def test_read_rows_takes_blank_lines_byte_order_mark_and_crlf(tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"prompt": "é", "completion": "ü"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    rows = data.read_rows(path, tokenizer)
    assert [row.line for row in rows.rows] == [1, 4]
    assert (rows.counts["lines"], rows.counts["blank"], rows.counts["used"]) == (4, 2, 2)
    assert rows.rows[0].key == rows.rows[1].key


def test_row_key_names_ids_and_labels():
    keys = {
        data.make_row([1, 2, 3], [False, True, True], 1, "text").key,
        data.make_row([1, 2, 3], [False, False, True], 1, "text").key,
        data.make_row([1, 2, 4], [False, True, True], 1, "text").key,
        data.make_row([1, 2, 3, 3], [False, True, True, True], 1, "text").key,
    }
    assert len(keys) == 4
    assert all(0 <= key < 2**63 for key in keys)
    # Recorded digests with dropout depend on it.
    pinned = data.make_row([1, 2, 3], [False, True, True], 1, "text").key
    assert (
        pinned
        == data.make_row([1, 2, 3], [True, True, True], 9, "messages").key
        == 3792698344174759287
    )


BAD = [
    ("not_json", b'{"prompt": "a", ', "not JSON"),
    ("not_json", b"[" * 100_000, "not JSON"),
    ("bad_utf8", b'{"text": "caf\xe9"}', "not UTF-8 at byte 14 of the line"),
    ("bad_format", ["prompt"], "a list, not an object"),
    ("bad_format", {"question": "a"}, "no known field .*question"),
    ("bad_format", {"prompt": "a"}, "no 'completion'"),
    ("bad_format", {"completion": "a"}, "no 'prompt'"),
    ("bad_format", {**PAIR, "text": "a"}, "more than one format"),
    ("bad_format", {"prompt": 3, "completion": "a"}, "'prompt' is a number; it must be a string"),
    ("bad_format", {"prompt": "a", "completion": None}, "'completion' is null"),
    ("bad_format", b'{"prompt": "a", "completion": "\\ud800"}', "surrogate"),
    ("bad_format", {"text": "another format"}, "format text in a file whose first row is prompt"),
    ("empty_completion", {"prompt": "a", "completion": " \n"}, "'completion' is empty"),
]


@pytest.mark.parametrize(("kind", "line", "message"), BAD)
def test_read_rows_refuses_or_skips_bad_rows_by_line(tmp_path, kind, line, message):
    tokenizer = make_tokenizer()
    path = write(tmp_path, PAIR, b"", line, PAIR)
    with pytest.raises(InputError, match=f"1 row cannot be used: line 3: .*{message}") as caught:
        data.read_rows(path, tokenizer)
    assert "\n" not in str(caught.value)
    assert "--on-bad-row skip" in str(caught.value)
    rows = data.read_rows(path, tokenizer, on_bad_row="skip")
    assert [row.line for row in rows.rows] == [1, 4]
    assert [(problem.line, problem.kind) for problem in rows.problems] == [(3, kind)]
    assert rows.counts[kind] == rows.counts["skipped"] == 1
    assert f"1 skipped (1 {data.KINDS[kind]}; lines 3)" in rows.summary()


def test_read_rows_names_the_first_five_of_many(tmp_path):
    path = write(tmp_path, PAIR, *[b"{"] * 7)
    with pytest.raises(InputError, match="7 rows cannot be used: line 2: .*line 6: .*and 2 more"):
        data.read_rows(path, make_tokenizer())


def test_read_rows_long_rows_are_refused_skipped_or_cut(tmp_path):
    tokenizer = make_tokenizer()
    long = {"prompt": "one", "completion": " two three" * 20}
    prompt_too_long = {"prompt": "one two three" * 20, "completion": "two"}
    path = write(tmp_path, PAIR, long, prompt_too_long)
    with pytest.raises(InputError, match=r"line 2: \d+ tokens, the limit is 12.*--on-long-row"):
        data.read_rows(path, tokenizer, max_length=12, on_bad_row="skip")
    rows = data.read_rows(path, tokenizer, max_length=12, on_long_row="skip")
    assert (rows.counts["used"], rows.counts["too_long"]) == (1, 2)
    # Cut to the limit, the third row has no supervised token left and is a bad row.
    with pytest.raises(InputError, match="line 3: no supervised token.*--on-bad-row"):
        data.read_rows(path, tokenizer, max_length=12, on_long_row="truncate")
    rows = data.read_rows(path, tokenizer, max_length=12, on_long_row="truncate", on_bad_row="skip")
    assert [len(row) for row in rows.rows] == [len(rows.rows[0]), 12]
    assert (rows.counts["truncated"], rows.counts["no_supervised_token"]) == (1, 1)
    exact = data.read_rows(path, tokenizer, max_length=len(rows.rows[0]), on_long_row="skip")
    assert exact.counts["used"] == 1


def test_read_rows_refuses_a_file_without_a_usable_row(tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="no usable row; it is empty"):
        data.read_rows(write(tmp_path, b"", b" "), tokenizer)
    with pytest.raises(InputError, match="no usable row; line 1: not JSON"):
        data.read_rows(write(tmp_path, b"{"), tokenizer, on_bad_row="skip")
    with pytest.raises(InputError, match="cannot be read"):
        data.read_rows(tmp_path / "absent.jsonl", tokenizer)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="cannot be read: the folder holds no .jsonl"):
        data.read_rows(tmp_path / "none", tokenizer)
    with pytest.raises(InputError, match="UTF-16"):
        data.read_rows(write(tmp_path, json.dumps(PAIR).encode("utf-16")), tokenizer)


def test_read_rows_refuses_a_tokenizer_without_end_token(tmp_path):
    with pytest.raises(InputError, match="no end token"):
        data.read_rows(write(tmp_path, PAIR), make_tokenizer(eos=False), on_bad_row="skip")


def test_read_rows_refuses_chats_without_template(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        data.read_rows(write(tmp_path, CHAT), make_tokenizer(), on_bad_row="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'; it must be one of refuse, skip"),
        ({"on_long_row": "cut"}, "on_long_row is 'cut'.*truncate"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
    ],
)
def test_read_rows_refuses_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        data.read_rows(write(tmp_path, PAIR), make_tokenizer(), **options)


def test_read_rows_counts_chats_that_never_end(tmp_path):
    endless = PLAIN_TEMPLATE.replace("<|stop|>", "")
    rows = data.read_rows(write(tmp_path, CHAT, CHAT), make_tokenizer(endless))
    assert rows.counts["without_end"] == 2
    rows = data.read_rows(write(tmp_path, CHAT, CHAT), make_tokenizer(PLAIN_TEMPLATE))
    assert rows.counts["without_end"] == 0
    assert rows.format == "messages"
