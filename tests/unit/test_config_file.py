"""fastlora train --config: a run starts again from its run.toml alone; the command line wins; what is unknown is refused by name."""

from __future__ import annotations

import tomllib

import pytest

from fastlora import config_file, rundir
from fastlora.errors import InputError
from fastlora.train_config import TrainConfig
from tests.unit.tiny_run import run_command, save_model, write_rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a model, data and a finished run."""
    from fastlora import cli

    folder = tmp_path_factory.mktemp("config")
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "first.toml").write_text(
        f'[train]\nmodel = "{folder}/model"\ndata = "{folder}/rows.jsonl"\noutput = "{folder}/one"\nbatch_size = 5\nepochs = 1\n'
        "learning_rate = 0.01\nseed = 7\n[lora]\nr = 4\nlora_alpha = 8\nlora_dropout = 0.1\n"
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--config", str(folder / "first.toml"), "--steps", "3"])
    assert not left.value.code
    return folder


def tables(folder):
    return tomllib.loads((folder / "run.toml").read_text())


def test_run_starts_again_from_its_file_alone(ran, capsys):
    code, out, err = run_command(capsys, "train", "--config", ran / "one" / "run.toml", "--output", ran / "two")
    assert code == 0, err
    assert "config:" not in out
    one, two = ((ran / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    first, second = tables(ran / "one"), tables(ran / "two")
    assert first["train"].pop("output") != second["train"].pop("output")
    assert first == second


def test_command_line_wins_over_the_file(ran):
    stored = tables(ran / "one")
    assert (stored["train"]["seed"], stored["train"]["batch_size"], stored["lora"]["lora_alpha"]) == (7, 5, 8)
    assert stored["train"]["steps"] == 3 and "epochs" not in stored["train"]
    found = config_file.train_settings({"micro_batch_size": 2, "gradient_accumulation_steps": 3, "batch_size": 6, "seed": 1}, {"batch_size": 4})
    assert found == {"batch_size": 4, "seed": 1}
    assert config_file.lora_config({"r": 4}, {"r": 8}, "m", "f").lora_alpha == 8
    assert config_file.lora_config({"r": 4, "lora_alpha": 2}, {"r": 8}, "m", "f").lora_alpha == 2


def test_run_toml_is_the_complete_configuration(ran):
    stored = tables(ran / "one")
    given = {k: v for k, v in TrainConfig(**stored["train"]).to_repeat().items() if v is not None}
    assert stored["train"] == given
    assert {"data", "model"} <= stored["made_of"].keys() and {"torch", "fastlora"} <= stored["versions"].keys()
    assert not {"resume", "overwrite"} & stored["train"].keys()


def test_run_of_the_same_folder_is_not_replaced(ran, capsys):
    before = (ran / "one" / "adapter_model.safetensors").read_bytes()
    code, _, err = run_command(capsys, "train", "--config", ran / "one" / "run.toml")
    assert code == 2 and "--overwrite" in err
    assert (ran / "one" / "adapter_model.safetensors").read_bytes() == before


def test_other_data_and_versions_are_said(ran, capsys):
    write_rows(ran / "other.jsonl", seed=5)
    text = (ran / "one" / "run.toml").read_text()
    version = tables(ran / "one")["versions"]["torch"]
    (ran / "old.toml").write_text(text.replace(f'torch = "{version}"', 'torch = "1.0"'))
    code, out, err = run_command(
        capsys, "train", "--config", ran / "old.toml", "--data", ran / "other.jsonl", "--output", ran / "three", "--steps", 1
    )
    assert code == 0, err
    said = " ".join(out.split())
    assert "config: data is not what the file was written for" in said and "config: steps is not" in said
    assert "torch 1.0 -> " in said and "config: model" not in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nlearning_rat = 1\n", "unknown key train.learning_rat; did you mean learning_rate?"),
        ("[lora]\nrank = 4\n", "unknown key lora.rank"),
        ("[trainer]\nseed = 1\n", "unknown table trainer"),
        ("seed = 1\n", "put it into [train]"),
        ("[train\n", "cannot be read as TOML"),
        ("[train]\nseed = 1\nseed = 2\n", "cannot be read as TOML"),
        ('[train]\nlearning_rate = "fast"\n', "learning_rate = 'fast'"),
        ("[train]\nbatch_size = 2.5\n", "batch_size = 2.5"),
        ("[lora]\nr = 0\n", "r is 0"),
        ("[lora]\nuse_dora = true\n", "DoRA"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path, capsys, text, named):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    code, _, err = run_command(capsys, "train", "--config", path, "--model", "m", "--data", "d", "--output", tmp_path / "out")
    assert code == 2 and named in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_file_and_resume_beside_it_are_refused(tmp_path, capsys):
    assert "no.toml" in run_command(capsys, "train", "--config", tmp_path / "no.toml")[2]
    code, _, err = run_command(capsys, "train", "--config", "a.toml", "--resume", "--output", tmp_path)
    assert code == 2 and "give one of the two" in err


def test_latin1_file_is_refused(tmp_path):
    (tmp_path / "l.toml").write_bytes(b'[train]\nmodel = "\xe4"\n')
    with pytest.raises(InputError, match="cannot be read as TOML"):
        config_file.read_config(tmp_path / "l.toml")


def test_toml_of_is_read_back(tmp_path):
    written = {"train": {"a": 'q"\\\n\x7f é', "b": [1, 2.5e-05], "c": True, "d": None, "e": {"x y": "z"}}}
    (tmp_path / "run.toml").write_text(rundir.toml_of(written), encoding="utf-8")
    del written["train"]["d"]
    assert rundir.read_run(tmp_path) == written
