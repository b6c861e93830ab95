"""Where a figure comes from: commit, GPU, versions, date."""

from __future__ import annotations

import datetime
import platform
import subprocess

import torch


def provenance() -> dict:
    """Commit (with a mark when the tree is dirty), GPU, driver-visible versions and the date, for a result file."""
    def git(*arguments):
        run = subprocess.run(["git", *arguments], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else "unknown"

    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": git("status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
