"""Write GGUF files for llama.cpp: an adapter as a LoRA file, a model with the adapter inside.

Tensors are converted and written one after the other, so that memory holds one of them twice. Names, rows and what is refused:
fastlora/gguf_names.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastlora.adapter import read_adapter, refuse_experts, split_copies
from fastlora.digest import PREFIX
from fastlora.errors import InputError, TrainingError
from fastlora.files import atomic_write
from fastlora.gguf_names import Names, package, pre_tokenizer, rope_of

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
# What the file says about the base's tokenizer, and nothing about its weights.
_COPIED = "tokenizer."

_Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def write_adapter(adapter: str | os.PathLike, output: pathlib.Path, config: Any, dtype: str = "float32") -> list[str]:
    """Write an adapter as a GGUF LoRA file for ``llama-cli --lora``; returns lines about it.

    The file has one alpha, and llama.cpp scales by alpha over each tensor's rank. Where s r differs between layers (patterns of
    rank under rsLoRA, patterns of alpha) the ratio goes into B, rounded once.

    Args:
        adapter: folder of the adapter. output: the file. config: the base's transformers configuration.
        dtype: a key of ``TYPES`` but q8_0.

    Raises:
        InputError: an adapter that cannot be read, a family or target that is not known, or another ``dtype``.
    """
    if dtype not in TYPES or dtype == "q8_0":
        raise InputError(f"dtype = {dtype!r}: allowed for an adapter are float32, float16, bfloat16")
    lora, tensors = read_adapter(adapter)
    tensors, _ = split_copies(tensors)
    refuse_experts(lora, "format gguf")
    gguf, names = package(), Names(config)
    paths = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    ranks = {path: tensors[f"{PREFIX}{path}.lora_A.weight"].shape[0] for path in paths}
    products = {path: lora.scaling_for(path) * ranks[path] for path in paths}
    alpha = max(products.values())
    folded = [path for path in paths if products[path] != alpha]

    def a(path: str) -> np.ndarray:
        return tensors[f"{PREFIX}{path}.lora_A.weight"].float().numpy()

    def b(path: str) -> np.ndarray:
        values = tensors[f"{PREFIX}{path}.lora_B.weight"].double() * (products[path] / alpha)
        return names.rows(f"{path}.weight", values.float().numpy())

    items: list[_Tensor] = []
    for path in paths:
        name = names.of(f"{path}.weight")
        for suffix, make in (("lora_a", a), ("lora_b", b)):
            shape = tuple(tensors[f"{PREFIX}{path}.lora_{suffix[-1].upper()}.weight"].shape)
            items.append((f"{name}.{suffix}", shape, lambda make=make, path=path: make(path)))
    with _writer(output, names) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[TYPES[dtype]]))
        _write(writer, items, lambda name, shape: TYPES[dtype])
    lines = [f"{output}: GGUF LoRA of {len(paths)} layers for the {names.family.architecture!r} architecture, alpha {alpha:g}"]
    if folded:
        lines.append(f"{len(folded)} layers have another scaling than alpha over rank; theirs is in B (first {folded[0]})")
    return lines


def write_model(model: nn.Module, tokenizer: Any, output: pathlib.Path, dtype: str = "float32",
                like: pathlib.Path | None = None) -> list[str]:
    """Write a plain causal model as a GGUF file; returns lines about it.

    Args:
        model: without adapters (merge and eject first). tokenizer: its tokenizer.
        dtype: a key of ``TYPES``: of the matrices; vectors are fp32. Under q8_0 a matrix whose rows are no multiple of 32 is fp16.
        like: the GGUF file that the base came as; its tokenizer's fields are copied as they stand.

    Raises:
        InputError: a family, tensor or tokenizer that is not known, or another ``dtype``.
    """
    gguf, names = package(), Names(model.config)
    if dtype not in TYPES:
        raise InputError(f"dtype = {dtype!r}: allowed are {', '.join(TYPES)}")
    items: list[_Tensor] = []
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        items.append((names.of(name), tuple(tensor.shape), lambda n=name, t=tensor: names.rows(n, t.float().cpu().numpy())))
    factors = _rope_factors(model)
    if factors is not None:
        items.insert(0, ("rope_freqs.weight", factors.shape, lambda: factors))
    fallback = []

    def kind(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2:
            return "F32"
        if dtype == "q8_0" and shape[-1] % 32:
            fallback.append(name)
            return "F16"
        return TYPES[dtype]

    with _writer(output, names) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        # the last part: a folder's whole path is nobody else's business
        writer.add_name(pathlib.PurePath(str(getattr(model.config, "_name_or_path", ""))).name or "merged")
        _add_sizes(writer, model.config)
        if like is None:
            _add_tokenizer(writer, tokenizer, model.config.vocab_size)
        else:
            _copy_tokenizer(writer, like)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[TYPES[dtype]]))
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write(writer, items, kind)
    lines = [f"{output}: GGUF model of {len(items)} tensors, {names.family.architecture!r} architecture, {dtype}"]
    if fallback:
        lines.append(f"{len(fallback)} matrices are fp16: their rows are no multiple of 32 (first {fallback[0]})")
    return lines


@contextlib.contextmanager
def _writer(output: pathlib.Path, names: Names) -> Iterator[Any]:
    """A GGUF writer on a temporary file that takes ``output``'s place at the end."""
    with atomic_write(output) as temporary:
        writer = package().GGUFWriter(temporary, names.family.architecture)
        try:
            yield writer
        finally:
            writer.close()


def _write(writer: Any, items: Sequence[_Tensor], kind: Callable[[str, tuple[int, ...]], str]) -> None:
    gguf = package()
    types = {name: getattr(gguf.GGMLQuantizationType, kind(name, shape)) for name, shape, _ in items}
    for name, shape, _ in items:
        raw, wide = types[name], {"F32": np.float32, "F16": np.float16}.get(types[name].name)
        if wide is None:
            stored = gguf.quant_shape_to_byte_shape(shape, raw)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=raw)
        else:
            writer.add_tensor_info(name, shape, np.dtype(wide), int(np.prod(shape)) * np.dtype(wide).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, make in items:
        values = np.ascontiguousarray(make())
        with np.errstate(over="ignore"):
            stored = gguf.quants.quantize(values, types[name])
        if not np.isfinite(values).all() or (stored.dtype == np.float16 and not np.isfinite(stored).all()):
            raise TrainingError(f"{name} holds values that are not finite in {types[name].name}; no file was written")
        writer.write_tensor_data(stored)


def _add_sizes(writer: Any, config: Any) -> None:
    rope = rope_of(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(model: nn.Module) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp wants it: by what each plain frequency is divided; fp32 [head_dim / 2]."""
    rope = rope_of(model.config)
    if rope["rope_type"] != "llama3":
        return None
    scaled = model.model.rotary_emb.inv_freq.detach().double().cpu()
    plain = float(rope["rope_theta"]) ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    return (plain / scaled).float().numpy()


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """A byte-level BPE tokenizer's fields, its vocabulary filled up to ``size`` tokens."""
    kinds = package().TokenType
    cut = pre_tokenizer(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise InputError(f"format gguf: the tokenizer has tokens up to {max(vocabulary.values())}, the model's embedding {size}")
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    tokens, types = [f"[PAD{i}]" for i in range(size)], [kinds.UNUSED] * size
    for token, i in vocabulary.items():
        control = i in special or (i in added and added[i].special)
        tokens[i], types[i] = token, kinds.CONTROL if control else kinds.USER_DEFINED if i in added else kinds.NORMAL
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
                      ("pad", writer.add_pad_token_id)):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            add(int(token))
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _copy_tokenizer(writer: Any, like: pathlib.Path) -> None:
    for name, field in package().GGUFReader(like).fields.items():
        if name.startswith(_COPIED):
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1])
