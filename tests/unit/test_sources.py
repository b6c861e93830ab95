"""Data files of every kind: which are found, how they are cut, and ten ways in which they break, each by file and line."""

from __future__ import annotations

import json
import sys

import pytest

from fastlora import data, sources
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer

pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")


def rows(count: int) -> list[dict]:
    return [{"prompt": f"one {'two ' * (n % 5)}", "completion": f"three é世 {n}"} for n in range(count)]


def jsonl(path, records, end="\n"):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + end for r in records), encoding="utf-8", newline="")
    return path


def parquet(path, records, **options):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def content(found: data.RowSet) -> list[tuple]:
    return [(row.input_ids.tolist(), row.labels.tolist(), row.key) for row in found.rows]


def test_read_rows_gives_the_same_rows_from_every_kind_of_file(tmp_path):
    tokenizer, records = make_tokenizer(), rows(23)
    files = {
        "jsonl": jsonl(tmp_path / "a.jsonl", records),
        "dos": jsonl(tmp_path / "dos.ndjson", records, "\r\n\r\n"),
        "array": tmp_path / "b.json",
        "pretty": tmp_path / "c.json",
        "lines in .json": jsonl(tmp_path / "d.json", records),
        "parquet": parquet(tmp_path / "e.parquet", records, row_group_size=7),
    }
    files["array"].write_text("\ufeff" + json.dumps(records))
    files["pretty"].write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    wanted = content(data.read_rows(files["jsonl"], tokenizer))
    assert len(wanted) == 23
    for name, path in files.items():
        found = data.read_rows(path, tokenizer)
        assert content(found) == wanted, name
        numbers = [int(row.line) for row in found.rows]
        assert numbers == (list(range(1, 47, 2)) if name == "dos" else list(range(1, 24))), name
    assert [str(row.line) for row in data.read_rows(files["pretty"], tokenizer).rows][:2] == [
        "2 (record 1)", "6 (record 2)"]


@pytest.mark.parametrize("size", [1, 7, 100, 333, 10_000])
def test_tasks_of_any_size_read_every_line_once(tmp_path, size):
    path = jsonl(tmp_path / "a.jsonl", rows(9), "\n\n")
    path.write_bytes(path.read_bytes()[:-2])  # no line end at the end
    seen, before = [], 0
    for task in sources.tasks([path], size):
        pieces = list(sources.records(task))
        seen += [(before + number, raw) for number, _, raw in pieces]
        before += len(pieces)
    assert seen == list(enumerate(path.read_bytes().split(b"\n"), start=1))


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_tasks_of_an_array_give_every_record_with_its_line(tmp_path, size, monkeypatch):
    records = [*rows(5), {"prompt": "x" * 200_000, "completion": "[{\\\"}]\n"}, 12, *rows(3)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=1))
    found = [(n, begin, json.loads(text)) for task in sources.tasks([path], size) for n, begin, text in sources.records(task)]
    assert [value for *_, value in found] == records
    lines = path.read_text().splitlines()
    assert all(lines[begin - 1].strip(" ,") in ("{", "12") for _, begin, _ in found)
    assert [n for n, *_ in found] == list(range(1, 11))


def test_read_rows_takes_a_folder_and_a_glob_and_names_the_file(tmp_path):
    tokenizer = make_tokenizer()
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    jsonl(folder / "b.jsonl", rows(3))
    parquet(folder / "a.parquet", rows(2))
    jsonl(folder / "deep" / "c.jsonl", [*rows(1), {"prompt": "x"}])
    (folder / "README.md").write_text("about")
    (folder / ".hidden.jsonl").write_text("{")
    found = data.read_rows(folder, tokenizer)
    assert [str(row.line) for row in found.rows] == [f"{n} of a.parquet" for n in (1, 2)] + [f"{n} of b.jsonl" for n in (1, 2, 3)]
    assert "5 rows (prompt-completion) of 2 files" in found.summary()
    assert found.notes == (f"1 other files in {folder} are no data and were not read",)
    with pytest.raises(InputError, match=r"line 2 of deep/c\.jsonl: no 'completion'"):
        data.read_rows(f"{folder}/**/*.jsonl", tokenizer)
    assert len(data.read_rows(f"{folder}/**/*.jsonl", tokenizer, on_bad_row="skip").rows) == 4
    with pytest.raises(InputError, match="no file matches"):
        data.read_rows(f"{folder}/*.csv", tokenizer)


def broken(folder, name: str):
    """A data file with one fault, and what the refusal must say."""
    good = json.dumps(rows(1)[0]).encode()
    array = json.dumps(rows(4), indent=1).encode()
    whole = parquet(folder / "whole.parquet", rows(5)).read_bytes()
    (folder / "whole.parquet").unlink()
    content, says = {
        "cut.jsonl": (good + b"\n" + good[:-9], r"line 2: not JSON: .* at column \d+"),
        "latin.jsonl": (good + b"\n\n" + '{"prompt": "é", "completion": "a"}'.encode("latin-1"), "line 3: not UTF-8 at byte 13"),
        "wide.jsonl": (good.decode().encode("utf-16"), "is UTF-16"),
        "packed.jsonl": (b"\x1f\x8b\x08\x00rest", r"compressed \(gzip\)"),
        "mixed.jsonl": (good + b'\n{"text": "a"}', "line 2: format text in a file whose first row is prompt-completion"),
        "half.jsonl": (good + b'\n{"prompt": "a"}', "line 2: no 'completion'"),
        "silent.jsonl": (good + b'\n{"prompt": "a", "completion": " "}', "line 2: 'completion' is empty"),
        "surrogate.jsonl": (b'{"prompt": "a", "completion": "\\udc00"}', "line 1: .*surrogate"),
        "empty.jsonl": (b"\n \n", "no usable row; it is empty"),
        "cut.json": (array[:-20], r"line 16: not JSON: .*; a JSON array cannot be read past it"),
        "comma.json": (array.replace(b"},", b"}", 1), r"line 6: not JSON: '\{' where a comma or \] should follow"),
        "latin.json": (array.replace(b"\\u00e9", b"\xe9", 1), "line 4: not UTF-8"),
        "record.json": (b'[{"prompt": "a", "completion": "b"},\n [1]]', r"line 2 \(record 2\): a list, not an object"),
        "one.json": (b'{\n "prompt": "a"}', "line 1: not JSON"),
        "nothing.json": (b"[]", "no usable row; it is empty"),
        "cut.parquet": (whole[:-30], "not a whole Parquet file"),
        "hole.parquet": (whole[:20] + b"\0" * 200 + whole[220:], "Parquet file is damaged|not a whole Parquet file"),
    }[name]
    (folder / name).write_bytes(content)
    return folder / name, says


BROKEN = ("cut.jsonl", "latin.jsonl", "wide.jsonl", "packed.jsonl", "mixed.jsonl", "half.jsonl", "silent.jsonl",
          "surrogate.jsonl", "empty.jsonl", "cut.json", "comma.json", "latin.json", "record.json", "one.json",
          "nothing.json", "cut.parquet", "hole.parquet")


@pytest.mark.parametrize("name", BROKEN)
def test_read_rows_names_file_and_line_of_a_broken_file(tmp_path, name):
    path, says = broken(tmp_path, name)
    with pytest.raises(InputError, match=says) as caught:
        data.read_rows(path, make_tokenizer())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_without_pyarrow_is_refused_by_name(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", rows(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow; pip install 'fastlora\[parquet\]'"):
        data.read_rows(path, make_tokenizer())


def test_parquet_holds_chats(tmp_path):
    chat = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    found = data.read_rows(parquet(tmp_path / "a.parquet", [chat, chat]), tokenizer)
    assert content(found) == content(data.read_rows(jsonl(tmp_path / "a.jsonl", [chat, chat]), tokenizer))
