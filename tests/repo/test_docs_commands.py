"""Every command on README and docs runs as it is printed, in a folder with what the pages speak of.

Not run, only looked up (test_readme.py): what calls nox or pip, what is marked slow, and the harness and the bench over their whole
lists, which are sessions of nox themselves.
"""

from __future__ import annotations

import shlex
import shutil

import pages
import pytest
from typer.testing import CliRunner

from tests.unit.tiny_run import run_command, save_model

# What stands for something of the reader's own, and so cannot run as it is printed.
PLACEHOLDERS = ("module:object", "FILE", "DIR")


def is_run(words: list[str]) -> bool:
    """Whether a command is one to run here."""
    if words[0] == "fastlora":
        # a command's bare name is a mention of it
        return len(words) > 2 and not set(words) & set(PLACEHOLDERS)
    # verify with cases or a model of one's own is short, unless for many seeds; the rest is the sessions verify and bench
    short = {"--cases", "--model", "--help"} & set(words)
    return words[:3] == ["python", "-m", "verify"] and bool(short) and not set(words) & {*PLACEHOLDERS, "--seeds"}


def to_run() -> list:
    found = {}
    for page in pages.PAGES:
        slow = {tuple(shlex.split(line)) for block in pages.blocks(page, "sh") if "slow" in block.words
                for line in block.text.splitlines()}
        for words in pages.commands(page):
            if is_run(words) and tuple(words) not in slow:
                found.setdefault(tuple(words), page.name)
    return [pytest.param(list(words), id=f"{page}: {shlex.join(words)}") for words, page in found.items()]


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """my-model, rows.jsonl, a run of 41 steps on it in my-run, and the adapters A and B."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "my-model")
    row = '{"prompt": "the answer is", "completion": " one two three"}\n'
    (folder / "rows.jsonl").write_text((row * 3 + row.replace("one", "hello world")) * 2, encoding="utf-8")
    for name, steps in (("my-run", 41), ("A", 1), ("B", 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            arguments = f"train --model my-model --data rows.jsonl --output {name} --steps {steps} --batch-size 2 --checkpoint-every 20"
            assert run_silently(arguments.split()) == 0
    return folder


def run_silently(arguments: list[str]) -> int:
    from fastlora import cli

    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return left.value.code or 0


def own_output(words: list[str]) -> str | None:
    """What the command makes anew."""
    if "--output" in words and "--resume" not in words:
        return words[words.index("--output") + 1]
    return None


@pytest.mark.parametrize("words", to_run())
def test_docs_commands_run(words, ready, tmp_path, monkeypatch, capsys, recwarn):
    place = shutil.copytree(ready, tmp_path / "place")
    made = own_output(words)
    if made and (place / made).exists():
        shutil.rmtree(place / made)
    monkeypatch.chdir(place)
    if words[0] == "fastlora":
        code, out, err = run_command(capsys, *words[1:])
    else:
        from verify.__main__ import app

        result = CliRunner().invoke(app, words[3:])
        code, out, err = result.exit_code, result.output, repr(result.exception)
    assert code == 0, err or out
    assert out
    # words about another library's names, which who reads them cannot change
    assert [str(w.message) for w in recwarn if w.category is FutureWarning] == []
    assert made is None or (place / made).exists()


def test_docs_commands_are_many():
    """The search above finds them: an empty list would pass too."""
    first = {words[1] for param in to_run() for words in param.values if words[0] == "fastlora"}
    assert {"train", "data", "generate", "replay", "report", "merge", "export"} <= first
