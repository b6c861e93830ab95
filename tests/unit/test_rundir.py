"""What a run says of its own command, and of data that is small for its settings."""

from __future__ import annotations

import os
import sys

import pytest

from fastlora import rundir
from fastlora.config import LoraConfig
from fastlora.encode import kind_of
from fastlora.rundata import FEW, few_steps
from fastlora.train_config import TrainConfig


def test_own_command_is_the_short_one_only_where_it_starts_this_installation(tmp_path, monkeypatch):
    here, other = tmp_path / "here bin", tmp_path / "other"
    for folder in (here, other):
        folder.mkdir()
        (folder / "fastlora").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    for path, said in ((here, "fastlora"), (other, f"'{here / 'python'}' -m fastlora"), (tmp_path, f"'{here / 'python'}' -m fastlora")):
        monkeypatch.setenv("PATH", str(path))
        assert rundir.own_command() == said
    monkeypatch.setenv("PATH", str(here))
    config = TrainConfig(data="x.jsonl", output="a b")
    assert rundir.how_to_go_on(config) == "fastlora train --output 'a b' --resume"
    os.unlink(here / "fastlora")
    assert rundir.how_to_go_on(config).endswith(" -m fastlora train --output 'a b' --resume")


@pytest.mark.parametrize(
    ("settings", "total", "said"),
    [({}, 1, "1 optimiser step of 16"), ({"batch_size": 4}, FEW - 1, f"{FEW - 1} optimiser steps of 4"), ({}, FEW, None), ({"steps": 2}, 2, None)],
)
def test_few_steps_are_said_unless_they_were_asked_for(settings, total, said):
    found = few_steps(TrainConfig(data="x.jsonl", output="o", **settings), total)
    assert (found is None) if said is None else (said in found and "fastlora advise" in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (True, "true or false"), (3, "a number"), (0.5, "a number"), ("x", "a string"), ([], "a list"), ({}, "an object"),
     (LoraConfig(), "LoraConfig")],
)  # fmt: skip
def test_values_are_called_what_json_calls_them(value, said):
    assert kind_of(value) == said
