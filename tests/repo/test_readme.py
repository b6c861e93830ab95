"""README, CONTRIBUTING and docs against the code: their commands exist, their Python runs, their lists are complete."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pages
import pytest
import source
import typer

from tests.unit.tiny_run import save_model

# A speed or a factor in prose. Tables made from bench/results stand between these marks.
FIGURE = re.compile(r"\d(\.\d+)?\s*(x\b|×|times (faster|slower)|tokens/s|TFLOP|[mµ]s\b|us\b|TB/s)")
GENERATED = re.compile(r"<!-- bench.*?<!-- /bench[^>]*-->", re.DOTALL)


def nox_sessions() -> set[str]:
    """Functions of the noxfile that are decorated as sessions."""
    functions = [n for n in source.tree(source.ROOT / "noxfile.py").body if isinstance(n, ast.FunctionDef)]
    return {f.name for f in functions if any("nox.session" in ast.unparse(d) for d in f.decorator_list)}


def options(command) -> set[str]:
    """Every spelling of a command's options."""
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")} | {"--help"}


def fastlora_commands() -> dict[str, set[str]]:
    """Options by subcommand of the ``fastlora`` command."""
    from fastlora.cli import app

    return {name: options(command) for name, command in typer.main.get_command(app).commands.items()}


def verify_options() -> set[str]:
    from verify.__main__ import app

    return options(typer.main.get_command(app))


def bench_commands() -> dict[str, set[str]]:
    """Options by command of ``python -m bench``."""
    from bench.__main__ import app

    return {name: options(command) for name, command in typer.main.get_command(app).commands.items()}


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("-")}


def test_docs_name_nox_sessions_that_exist():
    sessions, named = nox_sessions(), set()
    for page, words in pages.all_commands("nox"):
        own = words[: words.index("--")] if "--" in words else words
        if "-s" in own:
            asked = own[own.index("-s") + 1 :]
            assert asked and set(asked) <= sessions, f"{page}: nox {' '.join(words)}"
            named |= set(asked)
    assert named == sessions  # and every session is named somewhere


def test_docs_name_fastlora_commands_and_flags_that_exist():
    known, named = fastlora_commands(), set()
    for page, words in pages.all_commands("fastlora"):
        where = f"{page}: fastlora {' '.join(words)}"
        assert words[0] in known, where
        assert flags(words) <= known[words[0]], where
        named.add(words[0])
    assert {"train", "report", "merge"} <= named


def test_docs_name_verify_options_and_bench_arguments_that_exist():
    known = verify_options()
    asked = pages.all_commands("python", "-m", "verify")
    assert asked
    for page, words in asked:
        assert flags(words) <= known, f"{page}: python -m verify {' '.join(words)}"
    bench = bench_commands()
    for page, words in pages.all_commands("python", "-m", "bench"):
        where, own = f"{page}: python -m bench {' '.join(words)}", words[:1] and not words[0].startswith("-")
        assert not own or words[0] in bench, where
        # What the two levels do not know goes to pytest.
        assert not own or words[0] in ("kernel", "block") or flags(words) <= bench[words[0]], where


def test_docs_name_flags_that_some_command_has():
    known = verify_options() | set().union(*fastlora_commands().values(), *bench_commands().values())
    plugin = (source.ROOT / "verify/pytest_plugin.py").read_text(encoding="utf-8")
    known |= set(re.findall(r'addoption\("(--[\w-]+)"', plugin))
    for page in pages.PAGES:
        for span in pages.spans(page):
            if span.startswith("--"):
                assert flags(span.split()) <= known, f"{page.name}: {span}"


def test_docs_name_files_that_exist():
    missing = []
    for page in pages.PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
        for span in pages.spans(page):
            path = re.fullmatch(r"(fastlora|verify|tests|bench|docs|examples|\.ci)/[\w./-]*", span)
            if path and not (source.ROOT / span).exists():
                missing.append(f"{page.name}: {span}")
    assert missing == []


def test_docs_hold_no_figure_that_no_run_gave():
    for page in pages.PAGES:
        text = GENERATED.sub("", page.read_text(encoding="utf-8"))
        found = [match[0] for match in FIGURE.finditer(text)]
        assert found == [], page.name


def test_docs_list_every_model_family():
    from fastlora.families import FAMILIES

    text = (source.ROOT / "docs/adding-a-model-family.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- families -->(.*?)<!-- /families -->", text, re.DOTALL)[1]
    assert [name.strip() for name in listed.replace("\n", " ").split(",")] == list(FAMILIES)


def test_docs_list_every_guard():
    guards = (source.ROOT / "fastlora/guards.py").read_text(encoding="utf-8")
    named = set(re.findall(r'SilentFailure\(\s*"([a-z-]+)"', guards))
    listed = re.findall(r"^\| `([a-z]+(?:-[a-z]+)+)` \|", (source.ROOT / "docs/data.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(listed)


def test_docs_list_every_kernel_file_and_claim():
    from verify.claims import CLAIMS

    kernels = {p.name for p in source.files("fastlora/kernels")} - {"__init__.py"}
    assert kernels <= set(pages.spans(source.ROOT / "docs/kernels.md"))
    assert set(CLAIMS) <= set(pages.spans(source.ROOT / "docs/verification.md"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages speak of: my-model, a tiny random Llama with a tokenizer, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("page")
    save_model(folder / "my-model")
    row = '{"prompt": "the answer is", "completion": " one two three"}\n'
    (folder / "rows.jsonl").write_text(row * 3 + row.replace("one", "hello world"), encoding="utf-8")
    return folder


def with_python() -> list:
    found = []
    for page in pages.PAGES:
        block_list = pages.blocks(page, "python")
        marks = [pytest.mark.slow] if any("slow" in block.words for block in block_list) else []
        if block_list:
            found.append(pytest.param(page, id=page.name, marks=marks))
    return found


@pytest.mark.parametrize("page", with_python())
def test_python_blocks_of_a_page_run_in_order(page, place, monkeypatch):
    monkeypatch.chdir(place)
    for block in pages.blocks(page, "python"):
        # Blank lines in front: a traceback then shows the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.text, page.name, "exec")
        exec(code, {"__name__": "__main__"})
        assert code.co_filename == page.name


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(source.ROOT), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def documented_files() -> list[str]:
    """The first column of README's table of the output folder."""
    rows = [line for line in pages.PAGES[0].read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    start = next(i for i, line in enumerate(rows) if "adapter_model" in line)
    return [name for line in rows[start:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_readme_train_command_gives_the_files_that_readme_lists(place):
    readme = pages.PAGES[0]
    (line,) = [line for block in pages.blocks(readme, "sh") for line in block.text.splitlines()]
    done = run("-m", *line.split(), cwd=place)
    assert done.returncode == 0, done.stderr
    assert {"adapter_config.json", "checkpoints/"} <= set(documented_files())
    assert [name for name in documented_files() if not (place / "my-run" / name).exists()] == []
