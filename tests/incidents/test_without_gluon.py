"""A module of kernels that needed Gluon to be imported.

Where the installed Triton has no Gluon, the kernels for Hopper are left out and the portable ones run. The file of attention's dK and dV imported
names of the forward's that stand under that condition, so attention could not be imported at all. Found by reading, 2026-11-30.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[2]
PROBE = """
import importlib, pkgutil, sys
sys.modules["triton.experimental.gluon"] = None
import fastlora.kernels
from fastlora.kernels import hopper
for module in pkgutil.iter_modules(fastlora.kernels.__path__):
    importlib.import_module("fastlora.kernels." + module.name)
print(hopper.MISSING is not None, hopper.serves("sm_90"))
"""


def test_every_module_of_kernels_is_imported_without_gluon():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
