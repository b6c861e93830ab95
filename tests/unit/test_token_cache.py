"""Large data: the same rows through processes and a cache on disk, found again by digest, whole or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tiny_run import train, write_rows

from fastlora import data, sources, token_cache, token_rows, token_workers
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer


@pytest.fixture
def small_tasks(monkeypatch):
    """Every file is large and is cut into many tasks."""
    monkeypatch.setattr(data, "LARGE", 0)
    cut = sources.tasks
    monkeypatch.setattr(sources, "tasks", lambda files: cut(files, 700))


def content(found: data.RowSet) -> list[tuple]:
    return [(row.input_ids.tolist(), row.labels.tolist(), row.key, int(row.line), row.format) for row in found.rows]


def mixed_rows(path, count: int = 60):
    """Rows, some blank lines and some broken ones."""
    lines = write_rows(path, count).read_text().splitlines()
    lines[7:7] = ["", "{broken"]
    lines.insert(31, '{"prompt": "x", "completion": " "}')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_rows_are_those_held_in_memory(tmp_path, workers, small_tasks, monkeypatch):
    path, tokenizer = mixed_rows(tmp_path / "rows.jsonl"), make_tokenizer()
    options = {"max_length": 100, "on_bad_row": "skip", "on_long_row": "truncate"}
    held = data.read_rows(path, tokenizer, **options, workers=0)
    seen = []
    made = data.read_rows(path, tokenizer, **options, cache=tmp_path / "cache", workers=workers,
                          progress=lambda done, total: seen.append((done, total)))
    assert isinstance(made.rows.ids, np.memmap)
    assert content(made) == content(held)
    assert made.counts == held.counts and made.problems == held.problems
    assert {9, 32} < {int(p.line) for p in made.problems} and made.counts["truncated"] > 0
    assert seen[-1][0] <= seen[-1][1] == path.stat().st_size and len(seen) > 3
    assert "written to" in made.tokens

    def never(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(data, "encode_all", never)
    again = data.read_rows(path, tokenizer, **options, cache=tmp_path / "cache")
    assert content(again) == content(held) and again.counts == held.counts and again.problems == held.problems
    assert "made by an earlier run" in again.tokens
    for change in ({"max_length": 99}, {"tokenizer": make_tokenizer(bos=False)}, {"tokenizer": make_tokenizer(PLAIN_TEMPLATE)},
                   {"path": mixed_rows(tmp_path / "other.jsonl", 61)}):
        asked = {"path": path, "tokenizer": tokenizer, **options, **change}
        with pytest.raises(AssertionError, match="tokenized again"):
            data.read_rows(cache=tmp_path / "cache", **asked)


def test_workers_hand_errors_over_by_their_own_name(tmp_path, small_tasks):
    path = write_rows(tmp_path / "rows.jsonl", 40)
    with pytest.raises(InputError, match="no end token"):
        data.read_rows(path, make_tokenizer(eos=False), cache=tmp_path / "cache", workers=2)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(InputError, match="line 41: not JSON"):
        data.read_rows(path, make_tokenizer(), cache=tmp_path / "cache", workers=2)
    assert not (tmp_path / "cache").exists()


def test_a_dead_worker_is_named(tmp_path):
    encoding = data.Encoding(make_tokenizer(), "text", None, "refuse")
    task = sources.Task(0, str(tmp_path / "x"), "no such kind")
    worker = token_workers._Worker(token_workers._portable(encoding))
    with worker:
        worker._process.kill()
        with pytest.raises(InputError, match="a tokenizer process ended by itself .exit code -9"):
            worker.encode(task)


def test_cache_is_whole_or_absent(tmp_path, small_tasks, monkeypatch):
    path, cache = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "cache"
    original, calls = token_rows.Store.add, []

    def full(self, *arrays):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        original(self, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(token_rows.Store, "add", full)
        with pytest.raises(InputError, match="token_cache = .*No space left"):
            data.read_rows(path, make_tokenizer(), cache=cache, workers=0)
    assert len(calls) == 3 and not cache.exists()
    whole = content(data.read_rows(path, make_tokenizer(), cache=cache, workers=0))
    (folder,) = cache.iterdir()
    for name, cut in (("ids.bin", 4), ("index.bin", 1)):
        file = folder / name
        file.write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(InputError, match="damaged; remove that folder"):
            data.read_rows(path, make_tokenizer(), cache=cache, workers=0)
    (folder / token_cache.STATE).write_text("{")
    assert content(data.read_rows(path, make_tokenizer(), cache=cache, workers=0)) == whole
    assert [p.name for p in cache.iterdir()] == [folder.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache_is_refused(tmp_path, small_tasks):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    with pytest.raises(InputError, match="token_cache = .*cannot be written"):
        data.read_rows(write_rows(tmp_path / "rows.jsonl"), make_tokenizer(), cache=cache)


def test_a_file_for_a_cache_folder_is_refused(tmp_path, small_tasks):
    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="token_cache = .*rows.jsonl': cannot be written"):
        data.read_rows(path, make_tokenizer(), cache=path)


def test_data_changed_while_read_is_refused(tmp_path, small_tasks, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", 40)

    def touch(*_):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))

    with pytest.raises(InputError, match="was changed while it was read"):
        data.read_rows(path, make_tokenizer(), cache=tmp_path / "cache", workers=0, progress=touch)


def test_token_rows_are_a_sequence_read_by_index():
    made = [token_rows.make_row([3, *range(4, 4 + n)], [False] + [True] * n, n, "text") for n in (1, 5, 2)]
    index = np.zeros(3, token_rows.INDEX)
    index["end"], index["key"], index["number"] = np.cumsum([len(r) for r in made]), [r.key for r in made], [1, 2, 3]
    ids, labels = (np.concatenate([getattr(r, name) for r in made]) for name in ("input_ids", "labels"))
    rows = token_rows.TokenRows(ids, (labels >= 0).astype(np.uint8), index, "text")
    assert [r.input_ids.tolist() for r in rows] == [r.input_ids.tolist() for r in made]
    assert [r.labels.tolist() for r in rows] == [r.labels.tolist() for r in made]
    assert rows[-1].line == 3 and [len(r) for r in rows[:2]] == [2, 6]
    with pytest.raises(IndexError):
        rows[3]
    for some in (rows, made):
        assert np.concatenate(list(token_rows.lengths(some))).tolist() == [2, 6, 3]
        assert token_rows.longest(some) == 1
        assert token_rows.largest_token(some) == (8, 1)
        assert b"".join(token_rows.keys(some)) == b"".join(r.key.to_bytes(8, "little") for r in made)
    assert list(rows.blocks(2))[1][1].tolist() == [3] and token_rows.longest([]) == -1


def test_training_from_the_cache_gives_the_same_bytes(tmp_path, small_tasks):
    data_file = write_rows(tmp_path / "rows.jsonl")
    train(tmp_path, "a", data=data_file)
    cache = tmp_path / "fastlora-tokens"
    (folder,) = cache.iterdir()  # beside the output
    again, _, printed = train(tmp_path, "b", data=data_file, token_cache=str(cache))
    assert f"tokens: read from {folder}" in printed
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([json.loads(line) for line in data_file.read_text().splitlines()]))
    train(tmp_path, "c", data=array)
    folder = tmp_path / "several"
    folder.mkdir()
    for number, line in enumerate(data_file.read_text().splitlines()):
        with open(folder / f"{number // 5}.jsonl", "a") as part:
            part.write(line + "\n")
    result, *_ = train(tmp_path, "d", data=folder)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abcd"]
    assert files[0] == files[1] == files[2] == files[3]
    micro_batches = [m for record in result.log[:2] for m in record["micro_batches"]]
    seen = {(f, n) for m in micro_batches for f, n in zip(m["files"], m["lines"], strict=True)}
    assert seen == {(f"{n // 5}.jsonl", n % 5 + 1) for n in range(12)}
