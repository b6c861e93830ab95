"""The repository as text and syntax trees, for the tests that keep the house."""

from __future__ import annotations

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = ("fastlora", "verify", "bench", "tests", "examples")


def files(*folders: str) -> list[pathlib.Path]:
    """Python files below folders of the repository, sorted; folders that are not there give none."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: pathlib.Path) -> str:
    """The path from the repository's root, with slashes."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=name(path))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def module_of(path: pathlib.Path) -> str:
    """The module's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere or at its top level; names of ``from a import b`` as ``a.b``."""
    found: set[str] = set()
    module = tree(path)
    for node in module.body if top_level else ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".")
                drop = node.level - (path.name == "__init__.py")
                base = ".".join([*package[: len(package) - drop], *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def reaches(imported: set[str], *prefixes: str) -> list[str]:
    """Those of ``imported`` that are, or lie below, one of ``prefixes``."""
    return sorted(i for i in imported if any(i == p or i.startswith(p + ".") for p in prefixes))
