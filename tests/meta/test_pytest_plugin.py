"""The fixture ``verify_claim``: green, red with a case to paste, or skipped with a reason; and the example that uses it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

SUITE = """
from verify.mutants import MUTANTS
from verify.plain import SUBJECT

FAULTY = next(m for m in MUTANTS if m.name == "scale missing").plant(SUBJECT)

def test_sound(verify_claim):
    assert verify_claim(SUBJECT, "accuracy").cases == 3

def test_named(verify_claim):
    verify_claim("verify.plain:SUBJECT", "accuracy")

def test_faulty(verify_claim):
    verify_claim(FAULTY, "accuracy")

def test_without_a_part(verify_claim):
    verify_claim(SUBJECT, "invariance")
"""


def pytest_of(path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "verify.pytest_plugin", "-p", "no:cacheprovider", "-rs", str(path), *options],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_verify_claim_passes_fails_and_skips(tmp_path):
    path = tmp_path / "test_theirs.py"
    path.write_text(SUITE, encoding="utf-8")
    told = pytest_of(path, "--verify-cases", "3")
    assert "1 failed, 2 passed, 1 skipped" in told, told
    assert "accuracy does not hold for plain torch" in told
    assert "to see it again: verify.replay.replay(subject, 'accuracy', LinearCase(" in told
    assert "invariance not tried: the subject names no operations" in told


def test_example_is_about_forty_lines_and_passes():
    path = ROOT / "examples" / "verify_my_kernel.py"
    code = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(code) <= 52
    told = pytest_of(path, "--verify-cases", "2")
    assert "2 passed, 1 skipped" in told, told
    assert "updates not tried: the subject has no optimiser" in told
