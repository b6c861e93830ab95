"""Models, tokenizers and machines that a run cannot use, each refused in one sentence, or used and said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tiny_run import run_command, save_model, tiny_model, train, write_rows

from fastlora import guards, setup
from fastlora.errors import InputError
from fastlora.train_config import TrainConfig
from tests.unit.tiny_tokenizer import MARKED_TEMPLATE, PLAIN_TEMPLATE, make_tokenizer

CHAT = '{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}\n'


def bert():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2, max_position_embeddings=512))


def test_an_encoder_is_no_causal_language_model(tmp_path):
    with pytest.raises(InputError, match="BertLMHeadModel lets a position see later ones, so it is no causal"):
        train(tmp_path, "a", model=bert(), lora={"target_modules": ["query", "value"]})
    assert not (tmp_path / "a").exists()


def test_a_sequence_to_sequence_model_is_refused_by_the_command(tmp_path, capsys):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    code, _, err = run_command(capsys, "train", "--model", tmp_path / "t5", "--data", write_rows(tmp_path / "r.jsonl"),
                               "--output", tmp_path / "out")
    assert code == 2 and "its model cannot be read" in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_check_causal_leaves_no_gradient_and_the_mode_as_it_was():
    model = tiny_model().train()
    guards.check_causal(model)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    tokenizer = make_tokenizer()
    assert guards.vocabulary_note(tiny_model(), tokenizer, ()) is None
    tokenizer.add_tokens([f"<|{n}|>" for n in range(len(tokenizer), 321)])
    rows = setup_rows(tmp_path, tokenizer, '{"text": "one two"}\n')
    guards.check_tokens(tiny_model(), rows)
    assert "the tokenizer knows 321, the model 320" in guards.vocabulary_note(tiny_model(), tokenizer, rows)
    rows = setup_rows(tmp_path, tokenizer, '{"text": "one two"}\n{"text": "one <|320|>"}\n')
    with pytest.raises(InputError, match="line 2: token 320 is not in the model's embedding"):
        guards.check_tokens(tiny_model(), rows)


def setup_rows(tmp_path, tokenizer, text: str):
    from fastlora.data import read_rows

    (tmp_path / "rows.jsonl").write_text(text)
    return read_rows(tmp_path / "rows.jsonl", tokenizer).rows


def test_chats_need_neither_end_nor_padding_token(tmp_path):
    from fastlora.data import read_rows

    (tmp_path / "rows.jsonl").write_text(CHAT)
    tokenizer = make_tokenizer(PLAIN_TEMPLATE, bos=False, eos=False)
    assert tokenizer.pad_token is None and tokenizer.eos_token is None
    found = read_rows(tmp_path / "rows.jsonl", tokenizer)
    assert found.counts["without_end"] == 0  # the template's own end of a turn counts


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('no such role') }}", "line 1: the chat template refuses the messages: no such role"),
    ("{{ messages[9].content }}", "line 1: the chat template refuses"),
    (MARKED_TEMPLATE.replace("{{ m['content'] }}<|stop|>{% endgen", "{% endgen"), "line 1: .*generation.* marks hold no token"),
    ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "line 1: "),
])
def test_a_template_that_fails_or_supervises_nothing_is_named_by_line(tmp_path, template, says):
    with pytest.raises(InputError, match=says):
        setup_rows(tmp_path, make_tokenizer(template), CHAT)


def test_a_gpu_without_bf16_gets_fp16_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    cuda = torch.device("cuda")
    assert setup.choose_dtype("auto", cuda) == torch.float16
    with pytest.raises(InputError, match="dtype = 'bfloat16': this GPU has no bf16 arithmetic; allowed are float16, float32"):
        setup.choose_dtype("bfloat16", cuda)
    monkeypatch.setattr(setup, "choose_device", lambda name: (cuda, None))
    monkeypatch.setattr(setup, "load_tokenizer", lambda *_, **__: "tokenizer")
    monkeypatch.setattr(setup, "load_model", lambda *_, **more: more["dtype"])
    said: list[str] = []
    assert setup.load(TrainConfig(data="a", output="b", model="c"), said.append) == (torch.float16, "tokenizer")
    assert said[0].startswith("dtype: float16, because this GPU has no bf16 arithmetic")


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if str(path) == str(closed) else real(path, mode))
    with pytest.raises(InputError, match="closed cannot be written"):
        train(tmp_path, "closed/a")
    assert list(closed.iterdir()) == []


LIMITED = """
import resource, sys
from fastlora import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli.main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(tmp_path):
    """The system itself refuses to write more than 9 KB into a file: the log's lines fit, the adapter does not."""
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "9000", "train", "--model", model, "--data", data, "--output", tmp_path / "out",
         "--steps", "2", "--batch-size", "4"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last
    assert "Traceback" not in done.stderr
    left = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    assert left == ["checkpoints", "log.jsonl", "run.toml"]
