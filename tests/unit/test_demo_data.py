"""The demo's data set, made from a small library of its own and from this Python's."""

from __future__ import annotations

import json
import pathlib
import sysconfig

import pytest

from fastlora import demo_data
from fastlora.errors import InputError

# Two names of each kind, by the rule: the MD5 of the name divided by ten.
HELD_OUT = [name for name in map("module{}".format, range(60)) if demo_data.is_held_out(name)][:2]
TRAINED = [name for name in map("module{}".format, range(60)) if not demo_data.is_held_out(name)][
    :2
]


def function(name: str, statements: int = 1) -> str:
    """A function whose prompt and docstring no other has."""
    body = "".join(f"    total += {index}\n" for index in range(statements))
    return (
        f"def {name}(total):\n"
        f'    """Add some numbers to what {name} was given.\n\n'
        f'    Details nobody needs.\n    """\n{body}    return total\n\n\n'
    )


def library(folder: pathlib.Path, **sources: str) -> pathlib.Path:
    for name, source in sources.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return folder


def words(text: str) -> int:
    return len(text.split())


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def small(tmp_path):
    """Four modules of six functions each, the last two held out."""
    sources = {
        name: "".join(function(f"{name}_{index}", 1 + index) for index in range(6))
        for name in (*TRAINED, *HELD_OUT)
    }
    return library(tmp_path / "lib", **sources)


def test_write_holds_out_whole_modules(small, tmp_path):
    found = demo_data.write(
        tmp_path / "out", train_rows=99, held_out_rows=99, count_tokens=words, library=small
    )
    assert (found.train_rows, found.held_out_rows) == (12, 12)
    modules = {
        kind: {row["function"].partition(".")[0] for row in rows(path)}
        for kind, path in (("train", found.train), ("held_out", found.held_out))
    }
    assert modules == {"train": set(TRAINED), "held_out": set(HELD_OUT)}
    assert found.modules_held_out == tuple(sorted(HELD_OUT))


def test_write_gives_equal_bytes_for_equal_arguments(small, tmp_path):
    def written(name, seed):
        found = demo_data.write(
            tmp_path / name,
            train_rows=8,
            held_out_rows=8,
            seed=seed,
            count_tokens=words,
            library=small,
        )
        return found.train.read_bytes(), found.held_out.read_bytes()

    assert written("a", 0) == written("b", 0)
    assert written("a", 0)[0] != written("c", 1)[0]
    assert len(written("d", 0)[0].splitlines()) == 8


def test_write_takes_short_functions_first_and_leaves_out_too_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "SHORT", 30)
    monkeypatch.setattr(demo_data, "LONGEST", 60)
    sizes = [20, 1, 9, 12, 2, 200]
    source = "".join(function(f"f{index}", size) for index, size in enumerate(sizes))
    made = library(tmp_path / "lib", **{TRAINED[0]: source, HELD_OUT[0]: function("held")})
    found = demo_data.write(
        tmp_path / "out", train_rows=99, held_out_rows=1, count_tokens=words, library=made
    )
    lengths = [words(row["prompt"] + row["completion"]) for row in rows(found.train)]
    # 1 and 2 statements are short, in an order by hash; 9 and 12 follow by length; 20 and 200 are
    # too long.
    assert sorted(lengths[:2]) == sorted(length for length in lengths if length <= 30)
    assert lengths[2:] == sorted(length for length in lengths if length > 30)
    assert len(lengths) == 4
    assert found.dropped["too long"] == 2


def test_read_examples_takes_the_docstring_out_of_the_source(tmp_path):
    source = (
        "class Shape:\n"
        "    @property\n"
        "    def area(\n"
        "        self,\n"
        "    ):\n"
        '        """The area of\n'
        "        the whole shape.\n\n"
        '        Zero for a point."""\n'
        "        # a comment stays\n"
        "        return self.width\f * 2\n"
    )
    (example,) = demo_data.read_examples(library(tmp_path, some__in__inner=source))
    assert (example.module, example.name) == ("some.inner", "Shape.area")
    assert example.prompt == (
        "@property\ndef area(\n    self,\n):\n    # a comment stays\n"
        "    return self.width\f * 2\n" + demo_data.CUE
    )
    assert example.completion == " The area of the whole shape."
    assert "area of" not in example.prompt


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Nothing but a docstring makes this body."""\n',
        'def f():\n    """Too short."""\n    return 1\n',
        'def f(): """All of it stands on a single line."""; return 1\n',
        'def f():\n    """Half a pair: \\ud800, which UTF-8 cannot hold."""\n    return 1\n',
        "def f():\n    return 1\n",
        "def broken(:\n",
    ],
)
def test_read_examples_leaves_out_what_makes_no_row(tmp_path, source):
    assert list(demo_data.read_examples(library(tmp_path, module=source))) == []


def test_write_drops_duplicates_and_tests(tmp_path):
    made = library(
        tmp_path / "lib",
        **{
            TRAINED[0]: function("one") + function("two"),
            TRAINED[1]: function("one"),
            HELD_OUT[0]: function("one") + function("three"),
            "test__in__thing": function("four"),
        },
    )
    found = demo_data.write(
        tmp_path / "out", train_rows=9, held_out_rows=9, count_tokens=words, library=made
    )
    assert found.train_rows + found.held_out_rows == 3
    assert found.dropped["duplicate"] == 2
    prompts = [row["prompt"] for path in (found.train, found.held_out) for row in rows(path)]
    assert not any("four" in prompt for prompt in prompts)


def test_write_refuses_no_rows(small, tmp_path):
    def write(**options):
        given = {"train_rows": 1, "held_out_rows": 1, "library": small, **options}
        demo_data.write(tmp_path / "out", count_tokens=words, **given)

    with pytest.raises(InputError, match="train_rows = 0"):
        write(train_rows=0)
    with pytest.raises(InputError, match="held_out_rows = 0"):
        write(held_out_rows=0)
    with pytest.raises(InputError, match="0 functions with a docstring"):
        write(library=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_read_examples_of_this_python_are_many_and_held_out_ones_enough():
    """The demo needs 64 functions of modules that are not trained on."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    examples = list(demo_data.read_examples(library))
    assert len(examples) > 2000
    short = [one for one in examples if words(one.prompt + one.completion) <= 60]
    assert sum(one.held_out for one in short) >= 64
    assert not any('"""' in one.completion[:4] for one in examples)
