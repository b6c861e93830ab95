"""Where a figure comes from: commit, GPU, versions, date; and where its file goes."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess

import torch

from fastlora.files import atomic_write_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel")


def provenance(commit: str | None = None) -> dict:
    """Commit (with a mark when the tree is dirty), device, versions and the date, for a result file.

    Args:
        commit: said by the caller of a copy of that commit's tree without its history; None asks git.
    """

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        except FileNotFoundError:
            return "unknown"
        return run.stdout.strip() if run.returncode == 0 else "unknown"

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    has_gpu = torch.cuda.is_available()
    # what git says of a copy is no matter of the commit that was named
    dirty = "" if commit else git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit or git("rev-parse", "HEAD"),
        "dirty": dirty not in ("", "unknown"),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
        "cuda": torch.version.cuda,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_label(found: dict) -> str:
    """A short name of the device in a provenance: "H200", "H100 80GB HBM3", "CPU"."""
    gpu = found.get("gpu")
    return re.sub(r"^(NVIDIA|AMD) (GeForce )?", "", gpu) if gpu else "CPU"


def result_path(kind: str, found: dict) -> pathlib.Path:
    """``bench/results/<date>-<device>-<kind>.json``."""
    words = f"{found['date'][:10]} {device_label(found)} {kind}".lower()
    return RESULTS / (re.sub(r"[^a-z0-9.]+", "-", words).strip("-") + ".json")


def write_result(path: str | pathlib.Path, result: dict) -> None:
    """Write a result file, whole or not at all.

    Raises:
        ValueError: the result has no provenance or no kind.
    """
    for key in ("kind", "provenance"):
        if key not in result:
            raise ValueError(f"result: no {key!r}; allowed is a result that says what it is and where it comes from")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
