"""Every example runs as it stands, on its own tiny model, and shows what it says it shows."""

from __future__ import annotations

import os
import re
import runpy

import pytest
import source

EXAMPLES = [path for path in source.files("examples") if "__main__" in path.read_text(encoding="utf-8")]


def run(path, folder, monkeypatch, capsys) -> str:
    """Its standard output; it runs in this process, from ``folder``, without arguments of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [str(path)])
    monkeypatch.syspath_prepend(path.parent)
    here = os.getcwd()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        os.chdir(here)
    return capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=source.name)
def test_examples_run(path, tmp_path, monkeypatch, capsys):
    out = run(path, tmp_path, monkeypatch, capsys)
    assert out
    if path.name == "plain_loop.py":
        digests = [line.split()[-1] for line in out.splitlines()]
        assert len(digests) == 4
        assert digests[0] == digests[1]  # exact sums: one digest for both orders
        assert digests[2] != digests[3]  # float sums: the control
    if path.name == "transformers_trainer.py":
        adapter, again = re.findall(r"(?:adapter|read back): (\w{32})", out)
        assert adapter == again
    if path.name == "domain_model.py":
        before, after = map(float, re.search(r"held-out loss: ([\d.]+) -> ([\d.]+)", out).groups())
        assert after < before and "scaling: 11.314" in out
    if path.name == "sft_chat.py":
        assert out.count("$ fastlora") == 4 and "Rounding of the merge" in out


def test_examples_show_the_library_in_every_way_promised():
    names = {path.name for path in EXAMPLES}
    assert {"sft_chat.py", "domain_model.py", "plain_loop.py", "transformers_trainer.py"} <= names
