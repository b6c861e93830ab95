"""The kernel and block levels and the command, without pytest-benchmark's own run."""

from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as command
from bench import block_cases, kernel_cases, level
from bench.cases import measure

CASES = [(module, *each) for module in (kernel_cases, block_cases) for each in module.all_cases("cpu")]
KEYS = {"over_baseline", "control", "peak_bytes", "time", "baseline_time", "verified_worst_share"}


class Fixture:
    """What ``measure`` needs of pytest-benchmark's fixture."""

    enabled = True

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, rounds=1, iterations=1):
        self.rounds, self.iterations = rounds, iterations
        target()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny products on two workers of two threads each would wait for one another."""
    monkeypatch.setattr("bench.timing.SAMPLES", {"cpu": 1})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("module", "name", "size", "system"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_measure_verifies_and_gives_ratios(module, name, size, system):
    case = module.make(name, size, "cpu", torch.float32)
    benchmark = Fixture()
    measure(benchmark, case, system, "cpu")
    assert set(benchmark.extra_info) >= KEYS
    assert benchmark.iterations == benchmark.extra_info["time"]["repeats"]
    assert "no GPU" in benchmark.extra_info["notes"][-1]
    if system.startswith("fastlora"):
        assert 0 <= benchmark.extra_info["verified_worst_share"] <= 1.0
    row = level.row_of(f"{name}-{size}-{system}", benchmark.extra_info)
    assert row["case"] == f"{name}-{size}"
    assert row["baseline"] in level.line(row)
    case.close()


def test_a_run_cut_short_leaves_the_rows_of_the_tests_that_ended(tmp_path, monkeypatch):
    path = tmp_path / "block.json"
    monkeypatch.setenv(level.RESULT, str(path))
    monkeypatch.setenv(level.HEAD, json.dumps({"kind": "block", "provenance": {"commit": "abc"}, "rows": []}))
    kept = level.Kept()
    kept.add("norm-x-fastlora", {})  # nothing was timed
    assert not path.exists()
    for system in ("fastlora", "liger"):
        kept.add(f"norm-x-{system}", {"system": system, "time": {}})
    found = json.loads(path.read_text())
    assert found["provenance"] == {"commit": "abc"}
    assert [(row["case"], row["system"]) for row in found["rows"]] == [("norm-x", "fastlora"), ("norm-x", "liger")]
    monkeypatch.delenv(level.RESULT)
    level.Kept().add("norm-x-fastlora", {"system": "fastlora"})  # pytest by itself keeps no file


def test_measure_does_not_time_what_fails_verification(monkeypatch):
    case = block_cases.norm(block_cases.SIZES["cpu"]["row"][0], "cpu", torch.float32)
    monkeypatch.setattr("bench.check.SLACK", 1e-9)
    monkeypatch.setattr("torch.finfo", lambda dtype: type("Info", (), {"eps": 1e-30}))
    with pytest.raises(pytest.fail.Exception, match="fails verification"):
        measure(Fixture(), case, "fastlora", "cpu")


def test_measure_leaves_the_clock_alone_where_benchmarks_are_disabled():
    case = kernel_cases.make("norm-forward", kernel_cases.SIZES["cpu"]["row"][0], "cpu", torch.float32)
    benchmark = Fixture()
    benchmark.enabled = False
    measure(benchmark, case, "fastlora", "cpu")
    assert benchmark.extra_info == {}


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    return left.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("step", "--shape", "huge"), "allowed are llama-3.1-8b"),
        (("step", "--systems", "nobody"), "begins with none of"),
        (("step", "--device", "tpu"), "allowed are auto"),
        (("step", "--samples", "0"), "more than 0"),
        (("frobnicate",), "frobnicate"),
        (("step", "--frobnicate"), "--frobnicate"),
    ],
)
def test_command_refuses_bad_input_in_one_line(monkeypatch, capsys, arguments, said):
    assert run(monkeypatch, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_command_step_writes_a_result(monkeypatch, tmp_path, capsys):
    path = tmp_path / "r.json"
    arguments = ["step", "--shape", "tiny", "--layers", "1", "--tokens", "64", "--samples", "1", "--systems", "fastlora", "--rank", "2"]
    assert run(monkeypatch, *arguments, "--output", str(path), "--commit", "abc", "--device", "cpu") == 0
    result = json.loads(path.read_text())
    assert [row["system"] for row in result["rows"]] == ["frozen", "fastlora"]
    assert result["provenance"]["commit"] == "abc"
    assert str(path) in capsys.readouterr().out


@pytest.mark.slow
def test_command_block_runs_pytest_benchmark(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark times nothing in a worker of xdist
    assert run(monkeypatch, "block", "--output", str(path), "-k", "norm") == 0
    result = json.loads(path.read_text())
    assert result["kind"] == "block"
    assert [row["case"] for row in result["rows"]] == ["norm-cpu-192"]
    assert result["rows"][0]["control"]["median"] > 0
