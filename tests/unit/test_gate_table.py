"""The compile gate's table: what is written is read back, and a difference is one readable line."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench import gate_table
from bench.compile_gate import Report


def test_table_comes_back_and_tells_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_table, "FOLDER", tmp_path / "gate")
    assert gate_table.load("9.9.9") is None and gate_table.difference("x", Report(1, 0, 2, 3, 4), None) == ""
    gate_table.write("9.9.9", {"b": Report(90, 0, 1024, 4, 2), "a": Report(80, 0, 512, 0, 0)})
    table = gate_table.load("9.9.9")
    assert list(table) == ["a", "b"]
    assert gate_table.difference("b", Report(90, 0, 1024, 4, 2), table) == ""
    assert gate_table.difference("b", Report(90, 16, 2048, 4, 2), table) == "b: spills 0 -> 16, shared 1024 -> 2048"
    assert "not in the table" in gate_table.difference("c", Report(90, 0, 1024, 4, 2), table)
