"""Compile what a level needs in several processes, before anything is timed: one after the other, the compilers take most of a first run.

``python -m bench.warm LEVEL I N`` runs every N-th case of a level from the I-th on, each call once; compiled kernels stay in Triton's cache.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from bench.provenance import ROOT
from bench.shapes import default_dtype

# Each holds a case and a CUDA context; more than these share too little of what there is to compile.
MOST_PROCESSES = 8


def run(level: str, first: int, each: int, device: str, say: Callable[[str], None]) -> None:
    """Every ``each``-th case of "kernel" or "block" from the ``first`` on: its check, and each of its calls once. One that fails is told."""
    cases = importlib.import_module(f"bench.{level}_cases")
    compiled = getattr(cases, "COMPILE", None)  # torch.compile's code is made for the process that runs it
    names = list(dict.fromkeys((name, size) for name, size, _ in cases.all_cases(device)))
    for name, size in names[first::each]:
        torch.manual_seed(0)
        try:
            with contextlib.closing(cases.make(name, size, device, default_dtype(device))) as case:
                for system, call in case.calls.items():
                    if system != compiled:
                        call()
                case.check()
        except Exception as error:  # it is compiled when it is timed, and fails there if it has to
            say(f"{name}-{size}: not compiled ahead: {type(error).__name__}: {str(error)[:200]}")


def up(level: str, say: Callable[[str], None]) -> None:
    """Run all cases of a level once, in as many processes as half the cores; nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2))
    say(f"{level} level: compiling in {count} processes")
    commands = [[sys.executable, "-m", "bench.warm", level, str(i), str(count)] for i in range(count)]
    for process in [subprocess.Popen(command, cwd=ROOT) for command in commands]:
        process.wait()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "cuda", print)
