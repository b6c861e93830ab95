"""Compiling a level ahead: every case of every process once, nothing that was chosen or has no GPU, and failures are told."""

from __future__ import annotations

import subprocess
import types

import pytest
import torch

from bench import block_cases, kernel_cases, level, warm
from bench.cases import Case, Size


@pytest.fixture
def seen(monkeypatch):
    """Calls and checks of three cases of two systems each, of which the second fails."""
    calls: list[str] = []

    def make(name, size, device, dtype):
        def check():
            calls.append(f"{size} check")

        def call(system):
            if str(size) == "b":
                raise RuntimeError("out of memory")
            calls.append(f"{size} {system}")

        systems = ("frozen", "fastlora", block_cases.COMPILE)
        return Case("frozen", {system: (lambda system=system: call(system)) for system in systems}, check)

    listed = [("linear", Size(name, 1, 1, 1), system) for name in "abc" for system in ("fastlora", block_cases.COMPILE)]
    monkeypatch.setattr(block_cases, "make", make)
    monkeypatch.setattr(block_cases, "all_cases", lambda device: listed)
    return calls


def test_every_case_runs_once_in_one_of_the_processes_and_failures_are_told(seen):
    said: list[str] = []
    for first in range(2):
        warm.run("block", first, 2, "cpu", said.append)
    assert sorted(seen) == sorted(f"{size} {what}" for size in "ac" for what in ("frozen", "fastlora", "check"))
    assert said == ["linear-b: not compiled ahead: RuntimeError: out of memory"]


def test_the_kernel_level_is_compiled_ahead_too(monkeypatch):
    made = []
    monkeypatch.setattr(kernel_cases, "make", lambda name, size, *of: made.append((name, str(size))) or Case("", {}, lambda: None))
    warm.run("kernel", 0, 1, "cpu", print)
    assert made == list(dict.fromkeys((name, str(size)) for name, size, _ in kernel_cases.all_cases("cpu")))


def test_nothing_is_compiled_ahead_without_a_gpu(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", None)
    warm.up("block", said.append)
    assert said == []


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (6, 3), (128, 8)])
def test_processes_share_the_cases(monkeypatch, cores, count):
    started, said = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    waiting = types.SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda command, cwd: started.append(command[1:]) or waiting)
    warm.up("kernel", said.append)
    assert started == [["-m", "bench.warm", "kernel", str(i), str(count)] for i in range(count)]
    assert said == [f"kernel level: compiling in {count} processes"]


@pytest.mark.parametrize(("arguments", "warmed"), [([], ["block"]), (["-k", "qkv"], [])])
def test_only_a_whole_level_is_compiled_ahead(monkeypatch, tmp_path, arguments, warmed):
    done: list[str] = []
    monkeypatch.setattr(warm, "up", lambda name, say: done.append(name))
    monkeypatch.setattr(level, "provenance", lambda commit: {"commit": commit})
    monkeypatch.setattr(subprocess, "run", lambda *of, **options: types.SimpleNamespace(returncode=0))
    level.run("block", arguments, str(tmp_path / "none.json"), "abc", lambda text: None)
    assert done == warmed
