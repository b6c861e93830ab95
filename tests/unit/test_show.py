"""What ``fastlora data`` prints."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fastlora import show
from fastlora.data import read_rows
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer

TURNS = [("user", "one"), ("assistant", "wörld 世"), ("user", "three"), ("assistant", "two")]
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(CHAT)}\nnot json\n{json.dumps(CHAT)}\n")
    return file


def printed(path, **options) -> str:
    out = io.StringIO()
    show.show_rows(
        path, make_tokenizer(PLAIN_TEMPLATE), console=Console(file=out, width=200), **options
    )
    return out.getvalue()


def test_render_colours_supervised_tokens_alone(path):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    row = read_rows(path, tokenizer, on_bad_row="skip").rows[0]
    text = show.render(row, tokenizer)
    coloured = [text.plain[s.start : s.end] for s in text.spans if s.style == show.SUPERVISED]
    assert coloured == ["wörld 世<|stop|>", "two<|stop|>"]
    assert text.plain == tokenizer.decode(row.input_ids)


def test_show_rows_prints_rows_and_problems(path):
    out = printed(path)
    assert "line 1: " in out and "rows are taken as: messages" in out
    assert "wörld 世<|stop|>" in out
    assert "supervised tokens (counted from 0): " in out
    assert "2 rows (messages)" in out
    assert "line 2: not JSON" in out
    assert "line 3: " not in out
    assert "line 3: " in printed(path, lines=[3])
    assert "line 3: " in printed(path, count=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": [2]}, "line is 2, which is no usable row: not JSON"),
        ({"lines": [7]}, "past the file's 3 lines"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_show_rows_refuses_lines_that_are_no_rows(path, options, message):
    with pytest.raises(InputError, match=message):
        printed(path, **options)


def test_show_rows_of_a_folder_name_the_file(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"conversations": [
            {"from": "human", "value": "one"}, {"from": "gpt", "value": f"two {name}"}]}) + "\n")
    (tmp_path / "c.txt").write_text("x")
    out = printed(tmp_path, lines=[1])
    assert "line 1 of a.jsonl: " in out and "line 1 of b.jsonl: " in out
    assert "rows are taken as: conversations with from and value, ShareGPT" in out and "2 rows" in out and "of 2 files" in out
    assert "1 other files" in out and "written to" not in out
