"""The project's commands. `nox -l` lists them; `nox --no-venv -s NAME` runs one offline in the current environment."""

from __future__ import annotations

import os
import pathlib
import sys

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["tests"]

ROOT = pathlib.Path(__file__).parent
# One environment for all sessions, made here and not by nox, which gives each session its own: torch alone is gigabytes.
SHARED = ROOT / ".nox" / "shared"
IN_PLACE = "--no-venv" in sys.argv
# The oldest Triton we promise to work with, unpacked beside the environment's own for the compile gate.
OLD_TRITON = "3.6.0"


def python(session: nox.Session, *arguments: str, **options) -> None:
    """Run Python in the shared environment, installed first if pyproject.toml changed since."""
    session.run(str(ready(session)), *arguments, external=True, **options)


def ready(session: nox.Session) -> pathlib.Path:
    """The interpreter to use; makes and fills the shared environment when it has to."""
    if IN_PLACE:
        return pathlib.Path(sys.executable)
    interpreter = SHARED / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = SHARED / "installed-for"
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return interpreter
    session.log("installing fastlora and its tools; on Linux torch brings its CUDA build, about 5 GB on disk")
    session.run(sys.executable, "-m", "venv", str(SHARED), external=True)
    session.run(str(interpreter), "-m", "pip", "install", "-q", "-e", ".[dev]", external=True)
    stamp.write_text(wanted, encoding="utf-8")
    return interpreter


def old_triton(session: nox.Session) -> pathlib.Path | None:
    """The folder that holds the oldest Triton, downloaded once; None where nothing is installed, or Triton has no wheel."""
    if IN_PLACE or not sys.platform.startswith("linux"):
        return None
    folder = SHARED / f"triton-{OLD_TRITON}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        python(session, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), f"triton=={OLD_TRITON}")
        part.rename(folder)
    return folder


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Fine-tune a real 135M model on your Python's docstrings, and prove what changed."""
    python(session, "-m", "fastlora", "demo", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """What runs here in ten minutes: unit tests, the interpreter, the compile gate (twice), on a GPU its tests; `-- -m slow`: the rest."""
    if session.posargs:
        python(session, "-m", "pytest", *session.posargs)
        return
    # Two workers of one thread each would fight a threaded torch for two cores.
    spread = ("-n", "2", "--dist", "worksteal")
    python(session, "-m", "pytest", "-q", "-m", "not slow", *spread)
    python(session, "-m", "pytest", "-q", "-m", "interpreter and not slow", *spread, env={"TRITON_INTERPRET": "1"})
    folder = old_triton(session)
    if folder is not None:
        python(session, "-m", "pytest", "-q", "tests/compile", *spread, env={"PYTHONPATH": str(folder)})


@nox.session(venv_backend="none")
def verify(session: nox.Session) -> None:
    """The verification harness: claims tried on drawn cases, the worst case as a share of its bound."""
    python(session, "-m", "verify", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Kernels and blocks timed against the frozen ones; `-- step`: whole models; `-- gate`: compile all, no GPU; `-- publish`."""
    python(session, "-m", "bench", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff: names, imports, likely bugs."""
    python(session, "-m", "ruff", "check", ".")


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Run every command and Python block of README and docs, and the examples; what is slow or calls nox must exist."""
    pages = ("test_readme.py", "test_docs_commands.py", "test_examples.py")
    python(session, "-m", "pytest", "-q", *(f"tests/repo/{name}" for name in pages), *session.posargs)
