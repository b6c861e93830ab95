"""The project's commands. `nox -l` lists them; `nox --no-venv -s NAME` runs one offline in the current environment."""

from __future__ import annotations

import os
import pathlib

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

# One environment for all sessions: torch alone is gigabytes.
SHARED = {"venv_location": ".nox/shared"}
ROOT = pathlib.Path(__file__).parent
# The oldest Triton we promise to work with, unpacked beside the environment's own for the compile gate.
OLD_TRITON = "3.6.0"


def install(session: nox.Session) -> None:
    """Install the project with everything that its sessions need, once for each change of pyproject.toml."""
    if session.virtualenv is None or not session.virtualenv.is_sandboxed:
        return
    stamp = pathlib.Path(session.virtualenv.location) / "fastlora-installed"
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    session.log("installing fastlora and its tools: torch brings its CUDA build on Linux, about 5 GB on disk")
    session.install("-e", ".[dev]")
    stamp.write_text(wanted, encoding="utf-8")


def old_triton(session: nox.Session) -> str | None:
    """The folder that holds the oldest Triton, downloaded once; None in an environment of the user's own."""
    if session.virtualenv is None or not session.virtualenv.is_sandboxed or os.name != "posix":
        return None
    folder = pathlib.Path(session.virtualenv.location) / f"triton-{OLD_TRITON}"
    if not folder.exists():
        session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--target", f"{folder}.part", f"triton=={OLD_TRITON}")
        pathlib.Path(f"{folder}.part").rename(folder)
    return str(folder)


@nox.session(**SHARED)
def demo(session: nox.Session) -> None:
    """Fine-tune a real 135M model on your Python's docstrings, and prove what changed."""
    install(session)
    session.run("python", "-m", "fastlora", "demo", *session.posargs)


@nox.session(**SHARED)
def tests(session: nox.Session) -> None:
    """Everything that runs here: unit tests, kernels in the interpreter, the compile gate (twice), GPU tests on a GPU."""
    install(session)
    if session.posargs:
        session.run("python", "-m", "pytest", *session.posargs)
        return
    session.run("python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal")
    session.run("python", "-m", "pytest", "-q", "-m", "interpreter", "-n", "2", env={"TRITON_INTERPRET": "1"})
    folder = old_triton(session)
    if folder is not None:
        session.run("python", "-m", "pytest", "-q", "tests/compile", "-n", "2", env={"PYTHONPATH": folder})


@nox.session(**SHARED)
def verify(session: nox.Session) -> None:
    """The verification harness: claims tried on drawn cases, the worst case as a share of its bound."""
    install(session)
    session.run("python", "-m", "verify", *session.posargs)


@nox.session(**SHARED)
def bench(session: nox.Session) -> None:
    """Timings against the frozen layer. `nox -s bench -- gate` compiles every kernel for every GPU instead."""
    install(session)
    session.run("python", "-m", "bench", *session.posargs)


@nox.session(**SHARED)
def lint(session: nox.Session) -> None:
    """Ruff: names, imports, likely bugs."""
    install(session)
    session.run("ruff", "check", ".")


@nox.session(**SHARED)
def docs(session: nox.Session) -> None:
    """Run every Python block of README and docs; check that every command they name exists."""
    install(session)
    session.run("python", "-m", "pytest", "-q", "tests/repo", "-m", "not slow or slow")
