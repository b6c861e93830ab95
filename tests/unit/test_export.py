"""fastlora export: GGUF files read back by transformers' own reader, adapters for vLLM read back by ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from fastlora import setup  # noqa: E402
from fastlora.adapter import load_adapter, read_adapter, save_adapter  # noqa: E402
from fastlora.config import LoraConfig  # noqa: E402
from fastlora.errors import InputError  # noqa: E402
from fastlora.export import merge_to_folder  # noqa: E402
from fastlora.gguf_names import pre_tokenizer  # noqa: E402
from fastlora.inject import eject, inject, lora_layers  # noqa: E402
from fastlora.merge import merge  # noqa: E402
from fastlora.vllm_export import export_for_vllm  # noqa: E402
from tests.models import raw, tiny_model, tokens  # noqa: E402
from tests.unit.tiny_run import run_command  # noqa: E402
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PATTERNS = {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True}


def base(model_type):
    """A tiny model. The file keeps eps in fp32, so that it is a power of two here; transformers' reader takes Qwen 3's heads for 128
    wide without looking."""
    wide = {"head_dim": 128} if model_type == "qwen3" else {}
    return tiny_model(model_type, vocab_size=330, tie_word_embeddings=False, sliding_window=None, rms_norm_eps=2.0**-20, **wide)


def make(folder, model_type="llama", **lora):
    """Base model with tokenizer and an adapter whose B is not 0; returns the injected model."""
    model = base(model_type)
    model.save_pretrained(folder / "base")
    make_tokenizer(PLAIN_TEMPLATE).save_pretrained(folder / "base")
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | lora)
    save_adapter(inject(model, config, seed=1), folder / "adapter")
    return model.eval()


def export(capsys, folder, output, *arguments):
    return run_command(capsys, "export", "--model", folder / "base", "--adapter", folder / "adapter", "--output",
                       folder / output, *arguments)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_export_gguf_model_reads_back_as_the_merged_model(tmp_path, capsys, model_type):
    model = make(tmp_path, model_type)
    capsys.readouterr()
    code, out, err = export(capsys, tmp_path, "file/model.gguf", "--format", "gguf")
    assert code == 0 and err == "" and "GGUF model" in out
    merged = eject(merge(model), keep_merged=True)
    again = setup.load_model(str(tmp_path / "file")).eval()
    # transformers' own bar must not stand between our lines
    assert capsys.readouterr().err == ""
    assert raw(again.state_dict().items()) == raw(merged.state_dict().items())
    again.set_attn_implementation("eager")  # as the tiny model runs
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, merged(tokens()).logits)
    tokenizer = setup.load_tokenizer(str(tmp_path / "file"))
    ours = make_tokenizer(PLAIN_TEMPLATE)
    for text in ("hello world, one two", "naïve — 世界"):
        assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == (ours.eos_token, ours.chat_template)


def test_export_gguf_model_copies_the_tokenizer_of_a_gguf_base(tmp_path, capsys):
    model = make(tmp_path)
    assert export(capsys, tmp_path, "gguf/base.gguf", "--format", "gguf")[0] == 0
    save_adapter(model, tmp_path / "adapter")
    code, _, err = run_command(capsys, "export", "--model", tmp_path / "gguf", "--adapter", tmp_path / "adapter", "--output",
                               tmp_path / "twice.gguf", "--format", "gguf")
    assert code == 0, err
    fields = [
        {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items() if n.startswith("tokenizer.")}
        for path in (tmp_path / "gguf/base.gguf", tmp_path / "twice.gguf")
    ]
    assert fields[0] == fields[1] and fields[0]["tokenizer.ggml.pre"] == "gpt-2"
    # and merge writes a transformers folder from such a base
    folder, _ = merge_to_folder(str(tmp_path / "gguf"), tmp_path / "adapter", tmp_path / "merged")
    merged = setup.load_model(str(folder))
    assert not hasattr(merged.config, "quantization_config")
    twice = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "twice.gguf").tensors}
    assert np.array_equal(twice["blk.1.ffn_up.weight"], merged.model.layers[1].mlp.up_proj.weight.detach().numpy())


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("q8_0", None)])
def test_export_gguf_model_rounds_matrices_to_the_dtype(tmp_path, capsys, dtype, unit):
    model = make(tmp_path)
    code, out, _ = export(capsys, tmp_path, "file/model.gguf", "--format", "gguf", "--dtype", dtype)
    # feed-forward 48 is no multiple of q8_0's block of 32
    assert code == 0 and ("no multiple of 32" in out) == (dtype == "q8_0")
    merged, again = eject(merge(model), keep_merged=True).state_dict(), setup.load_model(str(tmp_path / "file")).state_dict()
    assert merged.keys() == again.keys()
    for name, value in merged.items():
        error, size = (again[name].double() - value.double()).abs(), value.double().abs()
        if value.dim() == 1:
            assert not error.any()
        elif unit is not None:
            # one rounding, or half of fp16's smallest subnormal
            assert (error <= unit * size + 2.0**-25).all()
        elif "down_proj" not in name:
            # q8_0: a step of the block's largest over 127, kept as fp16, rounded to half a step of at most 127
            largest = size.reshape(-1, 32).amax(1, keepdim=True)
            step = largest / 127
            assert (error.reshape(-1, 32) <= step * (0.5 + 127 * 2.0**-11) * (1 + 2.0**-10) + 2.0**-25 * 127).all()
    assert any((again[n] != merged[n]).any() for n in merged)


@pytest.mark.parametrize("lora", [{}, PATTERNS, {"use_rslora": True}], ids=["plain", "patterns", "rslora"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_export_gguf_lora_is_the_adapter_of_the_gguf_model(tmp_path, capsys, model_type, lora):
    """Base file + alpha / rank * B A, tensor by tensor in the file's own names and rows, is the merged model's file."""
    make(tmp_path, model_type, **lora)
    assert export(capsys, tmp_path, "merged.gguf", "--format", "gguf")[0] == 0
    code, out, err = export(capsys, tmp_path, "lora.gguf")
    assert code == 0, err
    assert ("theirs is in B" in out) == (lora is PATTERNS)
    # the base itself: an adapter whose B is 0
    config, adapter = read_adapter(tmp_path / "adapter")
    save_adapter(inject(base(model_type), LoraConfig(r=1)), tmp_path / "adapter")
    assert export(capsys, tmp_path, "base.gguf", "--format", "gguf")[0] == 0

    file = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {n: file.get_field(n).contents() for n in ("general.type", "adapter.type", "general.architecture")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": model_type}
    alpha = file.get_field("adapter.lora.alpha").contents()
    factors = {t.name: np.asarray(t.data, dtype=np.float64) for t in file.tensors}
    plain, merged = ({t.name: np.asarray(t.data, dtype=np.float64) for t in gguf.GGUFReader(tmp_path / name).tensors}
                    for name in ("base.gguf", "merged.gguf"))
    assert plain.keys() == merged.keys()
    changed = {name for name in plain if not np.array_equal(plain[name], merged[name])}
    assert changed == {name.rpartition(".")[0] for name in factors} and len(changed) == len(adapter) // 2
    for name in changed:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        delta = alpha / b.shape[1] * b @ a
        # one rounding of the merged weight, one of alpha and one of B where a ratio went into it
        size = np.abs(alpha / b.shape[1]) * np.abs(b) @ np.abs(a)
        assert (np.abs(plain[name] + delta - merged[name]) <= 2.0**-24 * np.abs(merged[name]) + 2.0**-23 * size).all(), name
        assert np.abs(delta).max() > 0


def test_export_gguf_writes_llama3_frequencies(tmp_path, capsys):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    model = tiny_model(vocab_size=330, rope_parameters=rope)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoraConfig(r=2)), tmp_path / "adapter")
    assert export(capsys, tmp_path, "model.gguf", "--format", "gguf")[0] == 0
    (found,) = [t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight"]
    # Llama 3's published rule, in the wave length of each frequency
    wanted = []
    for i in range(4):
        length = 2 * np.pi * 1e4 ** (2 * i / 8)
        smooth = min(1.0, max(0.0, (64 / length - 1.0) / (4.0 - 1.0)))
        wanted.append(1 / ((1 - smooth) / 8.0 + smooth))
    # tolerance-rule: transformers makes the frequencies in fp32: a power, a product and two sums, under 16 units
    np.testing.assert_allclose(found, wanted, rtol=16 * 2.0**-24)
    assert found.min() == 1 and found.max() == pytest.approx(8.0)  # tolerance-rule: as above


@pytest.mark.parametrize(("arguments", "message"), [
    (["--format", "onnx"], "format = 'onnx': allowed are gguf-lora, gguf, vllm"),
    (["--dtype", "q8_0"], "dtype = 'q8_0': allowed for gguf-lora are float32"),
    (["--dtype", "int4"], "dtype = 'int4'"),
    (["--output", "{folder}/model.bin"], "ends in .gguf"),
    (["--output", "{folder}/base"], "it exists"),
    (["--model", "{folder}/none"], "no such folder"),
])  # fmt: skip
def test_export_refuses_bad_arguments(tmp_path, capsys, arguments, message):
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = {"--output": str(tmp_path / "x.gguf"), "--model": str(tmp_path / "base"), "--adapter": str(tmp_path / "adapter")}
    given[arguments[0]] = arguments[1].format(folder=tmp_path)
    code, _, err = run_command(capsys, "export", *(word for pair in given.items() for word in pair))
    assert code == 2 and message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [["export", "--output", "{}/x.gguf"], ["export", "--output", "{}/x", "--format", "vllm"],
                                     ["merge", "--output", "{}/x"]], ids=lambda words: words[-1][-4:])  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_before_any_model_is_loaded(tmp_path, capsys, monkeypatch, command):
    from fastlora import files, setup

    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    monkeypatch.setattr(setup, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    words = [word.format(tmp_path) for word in command]
    code, _, err = run_command(capsys, *words, "--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"))
    assert code == 2 and f"{tmp_path} cannot be written" in err and "output = " in err


@pytest.mark.parametrize(("model_type", "extra", "message"), [
    ("granite", {}, "model type 'granite' is not known; allowed are llama, mistral, qwen2, qwen3"),
    ("mistral", {"sliding_window": 16}, "window of 16"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ("llama", {"attention_bias": True}, "attention_bias"),
])  # fmt: skip
def test_export_gguf_refuses_by_name_what_it_does_not_know(tmp_path, capsys, model_type, extra, message):
    model = tiny_model(model_type, **extra)
    model.save_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoraConfig(r=2)), tmp_path / "adapter")
    for format in ("gguf", "gguf-lora"):
        code, _, err = export(capsys, tmp_path, "x.gguf", "--format", format)
        assert code == 2 and message in err
    assert not (tmp_path / "x.gguf").exists()


def test_export_gguf_leaves_no_file_where_fp16_overflows(tmp_path, capsys):
    model = make(tmp_path)
    with torch.no_grad():
        next(lora_layers(model)).lora_B.weight[0, 0] = 1e5
    save_adapter(model, tmp_path / "adapter")
    code, _, err = export(capsys, tmp_path, "x.gguf", "--dtype", "float16")
    assert code == 1 and "blk.0.attn_q.weight.lora_b" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_pre_tokenizer_names_the_cut_and_refuses_others():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(pre, model=None):
        backend = Tokenizer(model or models.BPE())
        backend.pre_tokenizer = pre
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    byte, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    assert pre_tokenizer(made(byte)) == "gpt-2"
    assert pre_tokenizer(made(pre_tokenizers.Sequence([digits, byte]))) == "smollm"
    odd = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), byte])
    with pytest.raises(InputError, match="Split"):
        pre_tokenizer(made(odd))
    with pytest.raises(InputError, match="WordLevel"):
        pre_tokenizer(made(byte, models.WordLevel({"a": 0}, "a")))


@pytest.mark.parametrize("lora", [{}, PATTERNS, {"use_rslora": True, "target_modules": ".*(q|v)_proj"}],
                         ids=["plain", "patterns", "regex"])
def test_export_for_vllm_gives_one_rank_one_scaling_and_the_same_products(tmp_path, lora):
    model = make(tmp_path, **lora)
    lines = export_for_vllm(tmp_path / "adapter", tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm/adapter_config.json").read_text())
    rank = 8 if lora is PATTERNS else 4
    assert "--max-lora-rank 8" in lines[1]
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == rank
    assert isinstance(config["target_modules"], list) and config["modules_to_save"] is None and not config["use_dora"]
    flat = {layer.path: layer for layer in lora_layers(load_adapter(base("llama"), tmp_path / "vllm"))}
    assert flat.keys() == {layer.path for layer in lora_layers(model)}
    for layer in lora_layers(model):
        other = flat[layer.path]
        assert (other.rank, other.scaling) == (rank, flat[next(iter(flat))].scaling)
        a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
        wanted, size = layer.scaling * b @ a, layer.scaling * b.abs() @ a.abs()
        found = other.scaling * other.lora_B.weight.double() @ other.lora_A.weight.double()
        # B was rounded once to fp32 at most
        assert ((found - wanted).abs() <= 2.0**-23 * size).all()
    with pytest.raises(InputError, match="holds files"):
        export_for_vllm(tmp_path / "adapter", tmp_path / "vllm")


