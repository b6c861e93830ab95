"""House rules that a machine can check."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest
import source

import fastlora

MOST_LINES = 400
EVERYTHING = [*source.files(*source.CODE), source.ROOT / "noxfile.py"]
# Spelled so that this file does not hold the words.
LEFTOVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
CLOSENESS = re.compile(r"\b(all" r"close|assert_" r"close|isclose|approx)\(")


def offences(paths, test) -> list[str]:
    """``file:line`` wherever ``test(node)`` holds."""
    return [
        f"{source.name(path)}:{node.lineno}"
        for path in paths
        for node in ast.walk(source.tree(path))
        if test(node)
    ]


def lines_with(paths, pattern: re.Pattern, unless: str = "\0") -> list[str]:
    """``file:line`` of every line that matches ``pattern`` and does not hold ``unless``."""
    return [
        f"{source.name(path)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line) and unless not in line
    ]


def test_files_have_at_most_400_lines():
    assert len(EVERYTHING) > 50
    counts = {source.name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in EVERYTHING}
    assert {name: count for name, count in counts.items() if count > MOST_LINES} == {}


def test_modules_begin_with_a_docstring():
    bare = [source.name(p) for p in EVERYTHING if source.tree(p).body and not ast.get_docstring(source.tree(p))]
    assert bare == []


def test_fastlora_reads_no_environment_variable():
    names = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "environ", "getenv")
    found = offences(source.files("fastlora"), lambda node: source.dotted(node) in names)
    assert found == []


def test_code_holds_no_leftovers():
    assert lines_with(EVERYTHING, LEFTOVER) == []


def test_tolerances_are_derived_or_say_why():
    assert lines_with(source.files("tests", "verify"), CLOSENESS, unless="tolerance-rule") == []


def test_errors_are_not_swallowed():
    def swallows(node: ast.AST) -> bool:
        if not isinstance(node, ast.ExceptHandler):
            return False
        broad = node.type is None or source.dotted(node.type) in ("Exception", "BaseException")
        return node.type is None or (broad and all(isinstance(s, ast.Pass) for s in node.body))

    assert offences(EVERYTHING, swallows) == []


def test_fastlora_loads_no_pickle():
    def pickles(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and source.dotted(node.func) in (
            "torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "numpy.load", "np.load",
        )  # fmt: skip

    assert offences(source.files("fastlora"), pickles) == []


@pytest.mark.parametrize("name", sorted(set(fastlora.__all__) - {"__version__"}))
def test_public_names_have_a_docstring(name):
    home = importlib.import_module(fastlora._HOME[name])
    value = inspect.getattr_static(home, name)
    assert (inspect.getdoc(value) or "").strip()


def kernel_calls(prefix: str):
    """(file, function, call) for every call of ``tl.<prefix>...`` in the kernels."""
    for path in source.files("fastlora/kernels"):
        for function in ast.walk(source.tree(path)):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and source.dotted(node.func).startswith(f"tl.{prefix}"):
                        yield path, function, node


def is_integer(value: ast.AST, function: ast.FunctionDef) -> bool:
    """Whether a value is a cast to int64, or a name that begins its life in ``function`` as int64."""
    text = ast.unparse(value)
    if text.endswith(".to(tl.int64)"):
        return True
    firsts = [
        ast.unparse(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == text
    ]
    return bool(firsts) and "tl.int64" in firsts[0]


def test_kernels_use_integer_atomics_only():
    calls = list(kernel_calls("atomic_"))
    assert calls, "the token sums are expected to use integer atomics"
    floats = [
        f"{source.name(path)}:{call.lineno}"
        for path, function, call in calls
        if not is_integer(call.args[1], function)
    ]
    assert floats == []


def test_is_integer_tells_float_atomics_apart():
    function = ast.parse(
        "def kernel():\n"
        "    good = tl.zeros((4,), dtype=tl.int64)\n"
        "    bad = tl.zeros((4,), dtype=tl.float32)\n"
    ).body[0]
    verdicts = [is_integer(ast.parse(text, mode="eval").body, function) for text in ("good", "bad", "x.to(tl.int64)", "x")]
    assert verdicts == [True, False, True, False]


def test_kernels_use_no_block_pointers():
    assert [source.name(path) for path, _, _ in kernel_calls("make_block_ptr")] == []


def test_tests_assert_something():
    def silent(node: ast.AST) -> bool:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            return False
        checks = ("raises", "check", "assert", "opcheck", "fail")
        return not any(
            isinstance(inner, ast.Assert)
            or (isinstance(inner, ast.Call) and any(c in source.dotted(inner.func) for c in checks))
            for inner in ast.walk(node)
        )

    assert offences(source.files("tests"), silent) == []
