"""Which models go into GGUF files and how: architecture, tensor names, the order of rows.

llama.cpp keeps the rows of queries and keys of its ``llama`` architecture in another order than transformers (pairs of one
rotation side by side), and so the rows of B. What this table does not know is refused by name: a file that loads and answers
wrongly is worse than none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlora.errors import InputError

PACKAGE = "gguf"


@dataclass(frozen=True)
class GgufFamily:
    """How one ``model_type`` goes into a file.

    Attributes:
        architecture: llama.cpp's name.
        paired: rows of queries and keys stand in pairs (see :func:`paired_rows`).
    """

    architecture: str
    paired: bool = False


FAMILIES = {
    "llama": GgufFamily("llama", paired=True),
    "mistral": GgufFamily("llama", paired=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
}
_ROPES = ("default", "linear", "llama3")

# Pre-tokenizers of byte-level BPE by their regular expression, as llama.cpp names them.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        "qwen2",
}  # fmt: skip


def family_for(config: Any) -> GgufFamily:
    """The row for a transformers configuration.

    Raises:
        InputError: a model type, RoPE or attention that has no place in the table; it is named.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise InputError(f"format gguf: model type {config.model_type!r} is not known; allowed are {', '.join(FAMILIES)} "
                         "(merge writes a transformers folder for every model)")
    rope = rope_of(config)
    if rope["rope_type"] not in _ROPES:
        raise InputError(f"format gguf: rope_type {rope['rope_type']!r} is not known; allowed are {', '.join(_ROPES)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise InputError(f"format gguf: attention with a window of {window} positions has no place in llama.cpp's "
                         f"{found.architecture!r} architecture; allowed is full attention")
    for name in ("attention_bias", "mlp_bias"):
        if found.paired and getattr(config, name, False):
            raise InputError(f"format gguf: {name} has no place in llama.cpp's 'llama' architecture; allowed is a model without")
    return found


def rope_of(config: Any) -> dict[str, Any]:
    """``config.rope_parameters`` with its kind."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    found.setdefault("rope_type", "default")
    return found


class Names:
    """From transformers' tensor names to those of a GGUF file of one architecture.

    Args:
        config: the model's configuration.

    Raises:
        InputError: see :func:`family_for`; or the package ``gguf`` is absent.
    """

    def __init__(self, config: Any) -> None:
        gguf = package()
        self.family, self.config = family_for(config), config
        architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.architecture)
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def of(self, name: str) -> str:
        """The file's name of a tensor, such as ``blk.0.attn_q.weight``.

        Raises:
            InputError: the architecture has no such tensor.
        """
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"format gguf: tensor {name} has no place in llama.cpp's {self.family.architecture!r} architecture")
        return found

    def rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """``values`` [N, ...] with the rows in the file's order."""
        if not self.family.paired or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return values
        heads = self.config.num_attention_heads
        if name.rpartition(".")[0].endswith("k_proj"):
            heads = self.config.num_key_value_heads
        return paired_rows(values, heads)


def paired_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head of d rows: the two halves that one rotation turns, side by side."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def package():
    """The ``gguf`` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("format gguf: it needs the package gguf; pip install 'fastlora[demo]'") from error
    return gguf


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer cuts text before its merges.

    Raises:
        InputError: no byte-level BPE, or one that cuts in a way this table does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = json.loads(backend.to_str()) if backend is not None else {}
    kind = (made.get("model") or {}).get("type")
    if kind != "BPE":
        raise InputError(f"format gguf: the tokenizer is {kind or type(tokenizer).__name__}; allowed are byte-level BPE, or a "
                         "base model that is a GGUF file itself (its tokenizer is copied)")
    steps = made.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        found = _SPLITS.get(steps[0]["pattern"].get("Regex"))
        if found:
            return found
    raise InputError(f"format gguf: the tokenizer cuts text by {kinds}, which this version has no llama.cpp name for; allowed are "
                     "those of GPT-2, SmolLM, Llama 3 and Qwen 2, or a base model that is a GGUF file itself")
