"""Who may import whom, and what importing fastlora costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import source

# Of the time that importing torch takes. Measured 0.03 % on two cores: the names are lazy; the rest is room for a slow disk.
SHARE_OF_TORCH = 0.25


def arrows(folder: str, *forbidden: str, but: tuple[str, ...] = (), top_level: bool = False) -> list[str]:
    """``file: import`` for every forbidden import below ``folder``, except in the files ``but``."""
    return [
        f"{source.name(path)}: {found}"
        for path in source.files(folder)
        if not source.name(path).startswith(but or ("\0",))
        for found in source.reaches(source.imports(path, top_level=top_level), *forbidden)
    ]


def test_imports_of_a_file_are_seen_at_any_depth(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "ROOT", tmp_path)
    path = tmp_path / "fastlora" / "ops" / "late.py"
    path.parent.mkdir(parents=True)
    path.write_text("import os.path\nfrom . import near\nfrom ..far import thing\ndef f():\n    import peft.tuners as t\n")
    assert source.imports(path) == {"os.path", "fastlora.ops.near", "fastlora.far.thing", "peft.tuners"}
    assert source.imports(path, top_level=True) == {"os.path", "fastlora.ops.near", "fastlora.far.thing"}
    assert arrows("fastlora", "peft") == ["fastlora/ops/late.py: peft.tuners"]
    assert source.reaches({"verify", "verifying", "verify.oracle"}, "verify") == ["verify", "verify.oracle"]


def test_fastlora_imports_neither_its_judges_nor_peft():
    assert len(source.files("fastlora")) > 20
    assert arrows("fastlora", "verify", "bench", "tests", "examples", "peft", "hypothesis", "pytest") == []


def test_verify_imports_fastlora_in_its_subjects_alone():
    assert arrows("verify", "fastlora", but=("verify/subjects",)) == []
    assert arrows("verify", "bench", "tests", "examples") == []
    assert arrows("verify", "peft", but=("verify/peft_",)) == []


def test_oracle_imports_numpy_torch_and_itself():
    allowed = (*sys.stdlib_module_names, "numpy", "torch", "verify.oracle")
    paths = source.files("verify/oracle")
    assert paths
    for path in paths:
        imported = source.imports(path)
        assert sorted(imported - set(source.reaches(imported, *allowed))) == [], source.name(path)


def test_kernels_import_triton_torch_and_themselves():
    allowed = (*sys.stdlib_module_names, "torch", "triton", "fastlora.kernels", "fastlora.errors")
    for path in source.files("fastlora/kernels"):
        imported = source.imports(path)
        assert sorted(imported - set(source.reaches(imported, *allowed))) == [], source.name(path)


def test_kernels_are_imported_by_ops_alone():
    assert arrows("fastlora", "fastlora.kernels", but=("fastlora/ops/", "fastlora/kernels/")) == []


def test_triton_is_imported_at_the_top_of_kernels_alone():
    assert arrows("fastlora", "triton", but=("fastlora/kernels/",), top_level=True) == []


def test_cli_is_imported_by_the_command_alone():
    but = ("fastlora/__main__.py", "fastlora/cli")
    assert arrows("fastlora", "fastlora.cli", "fastlora.cli_train", but=but) == []


@pytest.mark.parametrize("folder", ["fastlora", "verify", "bench", "examples"])
def test_tests_are_imported_by_nobody(folder):
    assert arrows(folder, "tests") == []


def test_peft_is_imported_by_compatibility_tests_alone():
    assert arrows("tests", "peft", but=("tests/compat/",)) == []
    assert arrows("examples", "peft") == []


PROBE = """
import json, sys, time
begun = time.perf_counter()
import torch
after_torch, modules = time.perf_counter(), set(sys.modules)
import fastlora
done = time.perf_counter()
added = {name.partition('.')[0] for name in set(sys.modules) - modules}
public = [getattr(fastlora, name) for name in fastlora.__all__ if name != "Trainer"]
print(json.dumps({
    "torch": after_torch - begun, "fastlora": done - after_torch, "added": sorted(added),
    "heavy": [name for name in ("triton", "transformers", "typer", "matplotlib") if name in sys.modules],
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_is_silent_light_and_needs_no_gpu():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=source.ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)  # nothing else was printed
    assert found["added"] == ["fastlora"]
    # Even the names that make adapters and steps leave these alone.
    assert found["heavy"] == []
    assert not found["cuda"]
    assert found["fastlora"] <= SHARE_OF_TORCH * found["torch"]
