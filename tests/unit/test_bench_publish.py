"""README's part made from results: idempotent, from the newest of each device, and up to date in this repository."""

from __future__ import annotations

import copy
import json

import pytest

from bench import publish, tables
from bench.provenance import RESULTS
from fastlora.errors import InputError

RATIO = {"median": 0.8, "low": 0.79, "high": 0.82}
CONTROL = {"median": 1.001, "low": 0.99, "high": 1.01, "holds_one": True, "spread": [0.98, 1.02]}
TIME = {"median_ms": 450.0, "low_ms": 449.0, "high_ms": 452.0}


def said(date: str, gpu: str | None = "NVIDIA H200") -> dict:
    return {"date": date, "gpu": gpu, "commit": "0123456789abcdef", "dirty": False, "versions": {}}


def step_row(system: str, **more) -> dict:
    return {
        "system": system, "time": TIME, "over_frozen": RATIO, "control": CONTROL, "peak_bytes": 45 * 2**30, "tokens": 8192,
        "padded_tokens": 8192, "supervised_tokens": 8188, **more,
    }  # fmt: skip


def results() -> dict[str, dict]:
    block = {
        "system": "fastlora", "baseline": "frozen", "time": TIME, "baseline_time": TIME, "over_baseline": RATIO, "control": CONTROL,
        "peak_bytes": 2**30, "baseline_peak_bytes": 2**29,
    }  # fmt: skip
    small = block | {"case": "small-linear-x", "baseline": "peft", "tokens": 1024}
    small["graph"] = {"over_baseline": RATIO, "baseline_time": TIME, "control": CONTROL}
    rows = [
        step_row("frozen", attention_kernels=["flash_fwd"]), step_row("fastlora", with_optimizer=RATIO | {"median_ms": 470.0}),
        step_row("peft"), step_row("fastlora+rows", padded_tokens=9000), {"system": "fastlora+cap23", "cap_gib": 23, "fits": True},
        {"system": "peft+liger", "not_timed": "liger is not installed"},
    ]  # fmt: skip
    step = {"kind": "step", "shape": "llama-3.1-8b", "layers": 32, "tokens": 8192, "rank": 16, "dtype": "bfloat16", "rows": rows}
    step["fill"] = {"rows": {"128": 0.5}}
    return {
        "a-step": step | {"provenance": said("2026-11-25")},
        "b-block": {"kind": "block", "provenance": said("2026-11-25"), "rows": [block | {"case": "qkv-r16"}, small]},
        "c-kernel": {
            "kind": "kernel", "provenance": said("2026-11-25"),
            "rows": [block | {"case": "gemm", "baseline": "cuBLAS", "teraflops": 700.0},
                     block | {"case": "norm", "baseline": "copy", "gigabytes_per_second": 3900.0}],
        },
    }  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder of results, a README with old text between the marks, and a place for the figure."""
    folder = tmp_path / "results"
    folder.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    return folder, readme, tmp_path / "bench.svg"


def put(folder, found: dict[str, dict]) -> None:
    for name, result in found.items():
        (folder / f"{name}.json").write_text(json.dumps(result))


def test_publish_is_idempotent(place):
    put(place[0], results())
    publish.publish(*place)
    first = [path.read_bytes() for path in place[1:]]
    done = publish.publish(*place)
    assert [path.read_bytes() for path in place[1:]] == first
    assert done[0].endswith("unchanged")
    text = place[1].read_text()
    assert text.startswith("before\n<!-- bench -->\n![") and text.endswith("<!-- /bench -->\nafter\n")
    for part in ("0.800 (0.790-0.820)", "45.0", "fits 23 GiB", "liger is not installed", "qkv-r16", "700 TFLOP/s", "3,900 GB/s", "flash_fwd"):
        assert part in text, part


def test_publish_prints_what_exactness_costs(place):
    found = results()
    rows = [step_row(name, over_frozen=RATIO | {"median": over}) for name, over in (
        ("fastlora", 0.9), ("fastlora+float", 0.75), ("fastlora+nonexact", 0.72))]  # fmt: skip
    found["a-step"]["rows"] += rows[1:]
    found["a-step"]["exact_over"] = tables.costs(rows)
    put(place[0], found)
    publish.publish(*place)
    text = place[1].read_text()
    assert "exact over float sums, same kernels: 1.200 x." in text
    assert "exact over the fastest non-exact configuration: 1.250 x." in text


def made_up(tokens: int, wall: float, gpu: float | None, system: str = "fastlora") -> dict:
    """A row of the small linear that nobody measured."""
    row = results()["b-block"]["rows"][1] | {"case": f"small-linear-made-up-m{tokens}", "system": system, "tokens": tokens}
    row["over_baseline"] = RATIO | {"median": wall}
    timed = {"over_baseline": RATIO | {"median": gpu}, "baseline_time": TIME | {"median_ms": 0.125}, "control": CONTROL}
    return row | {"graph": {"not_timed": "not tried: no GPU"} if gpu is None else timed}


def test_small_table_tells_what_is_above_pefts_maths_and_from_which_tokens():
    rows = [made_up(128, 3.0, 2.0), made_up(512, 2.5, 1.25), made_up(1024, 1.5, 0.75, "fastlora-float"), made_up(2048, 0.5, 0.5)]
    text = tables.small_table({"rows": rows, "provenance": said("2026-11-25")})
    assert len([line for line in text.splitlines() if line.startswith("| small-linear")]) == 4
    assert "GPU time above PEFT's maths from 512 tokens on: small-linear-made-up-m512, fastlora (1.250) of 3." in text
    assert "Wall clock above PEFT's maths from 1,024 tokens on: small-linear-made-up-m1024, fastlora-float (1.500) of 2." in text
    assert "| small-linear-made-up-m1024 | float | 450.000 | 1.500 (0.790-0.820) | 0.125 | 0.750 (0.790-0.820) |" in text
    assert "Graph replay: A/A controls: 1.001 to 1.001" in text


def test_small_table_says_that_graphs_were_not_tried_and_that_none_is_above():
    text = tables.small_table({"rows": [made_up(1024, 0.9, None)], "provenance": said("2026-11-25")})
    assert "| not tried: no GPU |" in text and "Graph replay" not in text and "GPU time above" not in text
    assert "Wall clock above PEFT's maths from 1,024 tokens on: none of 1." in text


def test_block_and_kernel_tables_say_what_is_of_an_earlier_commit_and_the_gpus_own_time():
    found = results()
    block, kernel = found["b-block"], found["c-kernel"]
    block["rows"][0]["graph"] = {"over_baseline": RATIO | {"median": 1.25}}
    block["rows"].append(block["rows"][0] | {"case": "norm", "commit": "fedcba9876"})
    kernel["rows"].append(kernel["rows"][0] | {"case": "rope", "commit": "fedcba9876"})
    said = tables.block_table(block)
    assert "| qkv-r16 |" in said and "| norm (at fedcba9) |" in said and said.count(", GPU alone 1.250") == 2
    assert "| gemm |" in tables.kernel_table(kernel) and "| rope (at fedcba9) |" in tables.kernel_table(kernel)


def test_publish_takes_the_newest_of_each_device(place):
    found = results()
    older, other = copy.deepcopy(found["a-step"]), copy.deepcopy(found["a-step"])
    older["provenance"] = said("2026-11-20")
    older["rows"][1]["time"] = TIME | {"median_ms": 999.0}
    other["provenance"] = said("2026-11-01", "NVIDIA H100")
    put(place[0], found | {"z-old": older, "y-h100": other})
    publish.publish(*place)
    text = place[1].read_text()
    assert "999.0" not in text
    assert "one H200" in text and "one H100" in text


def test_publish_refuses_a_readme_without_marks_and_a_file_that_is_no_result(place):
    folder, readme, figure = place
    (folder / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="bad.json"):
        publish.publish(folder, readme, figure)
    (folder / "bad.json").unlink()
    readme.write_text("no marks")
    with pytest.raises(InputError, match="marks|between"):
        publish.publish(folder, readme, figure)


def test_readme_is_what_publish_makes_of_the_results():
    made = publish.text_of(publish.newest(RESULTS))
    assert publish.MARKS.search(publish.README.read_text(encoding="utf-8"))[0] == f"<!-- bench -->\n{made}<!-- /bench -->"


def test_a_system_that_the_newest_result_did_not_time_comes_from_the_latest_that_did(place):
    found = results()
    for date, more in (("2026-11-10", ["peft+liger", "peft+ckpt"]), ("2026-11-20", ["peft+liger", "fastlora+r128"])):
        rows = [step_row(name, time=TIME | {"median_ms": float(date[-2:] + "1")}) for name in ("peft", *more)]
        found[f"z-{date}"] = found["a-step"] | {"provenance": said(date), "rows": [step_row("frozen"), *rows]}
    put(place[0], found)
    publish.publish(*place)
    text = place[1].read_text()
    # ours have changed since, and PEFT was timed anew
    assert "fastlora+r128" not in text and text.count("| peft |") == 1
    assert "| peft+liger | 201.0 |" in text and "| peft+ckpt | 101.0 |" in text and text.count("| peft+liger |") == 1
