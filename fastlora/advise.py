"""Advice: is LoRA the right tool, with which settings, and what will it take.

:func:`decide` is a small interpreter of one data file, ``advice_rules.json``; docs/advise/advise.js is the same interpreter for a browser,
and tests hold the two together. What it reads is a plain dictionary of facts, made here from a model's folder and a data file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json

from fastlora import families
from fastlora.advice_memory import ModelFacts, epoch_seconds, lora_parameters, memory, usable
from fastlora.errors import InputError

GIB = 2**30
GOALS = ("general", "domain", "speed")
# Rows whose text is looked at for how well the tokenizer knows it.
SAMPLE = 200


@functools.cache
def rules() -> dict:
    """The table that all advice comes from."""
    return json.loads(importlib.resources.files("fastlora").joinpath("advice_rules.json").read_text(encoding="utf-8"))


# Facts ---------------------------------------------------------------------------------------------------------


def model_facts(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """What the formulas read of a model's folder: its configuration, and the shapes of a model without weights.

    Raises:
        InputError: no model there, no causal language model, or decoder layers without the projections known here.
    """
    import torch
    import transformers

    from fastlora.setup import find_model, reading

    place, gguf_file, fetch = find_model(name, gguf_file)
    files = {"gguf_file": gguf_file} if gguf_file else {}
    with reading("configuration", place), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            place, local_files_only=not fetch, trust_remote_code=trust_remote_code, **files
        )
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return facts_of(model, place)


def facts_of(model, name: str = "model") -> ModelFacts:
    """:class:`ModelFacts` of a model, on whatever device, with or without weights.

    Raises:
        InputError: its decoder layers do not have the projections known here.
    """
    layers = [m for m in model.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
    family = families.family_of(model)
    layout = family.layout or families.Layout()
    wanted = [("self_attn", layout.qkv), ("self_attn", ("o_proj",)), ("mlp", layout.gate_up), ("mlp", ("down_proj",))]
    groups = []
    for owner, names in wanted:
        linears = [getattr(getattr(layer, owner), n, None) for layer in layers[:1] for n in names]
        if not linears or any(not hasattr(linear, "in_features") for linear in linears):
            raise InputError(f"model = {name!r}: its model type {family.model_type!r} has no {', '.join(names)} in its decoder "
                             "layers; allowed are dense decoder layers with those projections")
        groups.append((linears[0].in_features, tuple(linear.out_features for linear in linears)))
    config = model.config.get_text_config()
    attention = layers[0].self_attn
    heads, size = config.num_attention_heads, attention.head_dim
    return ModelFacts(
        parameters=sum(p.numel() for p in model.parameters()), layers=len(layers), hidden=config.hidden_size,
        vocabulary=config.vocab_size, positions=config.max_position_embeddings, groups=tuple(groups), heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=size, head_norms=hasattr(attention, "q_norm"),
        sandwich=layout.norms[1] is not None, fused=family.layout is not None,
    )


def data_facts(path: str, tokenizer) -> dict:
    """Rows, tokens, supervised tokens and quantiles of the lengths of a data file, through fastlora's own reader.

    ``padded`` counts tokens with every row padded to the CUDA alignment, ``squares`` sums the squares of the lengths,
    ``bytes_per_token`` is that of the text of the first rows.

    Raises:
        InputError: no usable row, or a file that cannot be read.
    """
    from fastlora.data import read_rows
    from fastlora.packing import padded_length

    table = rules()
    found = read_rows(path, tokenizer, on_bad_row="skip")
    lengths = sorted(len(row) for row in found.rows)
    if not lengths:
        raise InputError(f"data = {path!r}: no usable row in it")
    last = len(lengths) - 1
    quantiles = {q: lengths[-(-last * round(float(q) * 10) // 1000)] for q in table["quantiles"]}
    sample = found.rows[:SAMPLE]
    texts = [tokenizer.decode(row.input_ids.tolist()) for row in sample]
    return {
        "rows": len(lengths), "skipped": found.counts["skipped"], "tokens": sum(lengths),
        "padded": sum(padded_length(n, table["alignment"]) for n in lengths),
        "supervised": sum(row.supervised for row in found.rows), "squares": sum(n * n for n in lengths), "quantiles": quantiles,
        "bytes_per_token": sum(len(t.encode()) for t in texts) / sum(map(len, sample)),
    }  # fmt: skip


# Decisions -----------------------------------------------------------------------------------------------------


def decide(facts: dict) -> dict:
    """What the rules say.

    Args:
        facts: ``goal``; ``model`` (:class:`ModelFacts`); ``data`` (:func:`data_facts`) or None; ``card`` in bytes or None;
            ``rank`` or None (by the rules); ``new_vocabulary``.

    Returns:
        lora, train: settings by name; verdicts: names of what speaks against LoRA; fits; memory: bytes by part, or None where
        layers are not fused; skipped_above: whether longer rows are skipped.
    """
    table, model, data = rules(), facts["model"], facts["data"]
    goal = table["goals"][facts["goal"]]
    wanted = facts["rank"] or _rank(goal, model, data, table)
    lengths = _lengths(model, data, table)
    batch, epochs = _batch(goal, data, table)
    chosen = _fitting(facts, wanted, lengths, batch, table)
    rank, length, micro, checkpointing, parts, fits = chosen
    stabilised = rank > table["rslora_above"]
    return {
        "lora": {
            "r": rank, "lora_alpha": goal["alpha_over_rank"] * (table["rslora_root"] if stabilised else rank),
            "lora_dropout": table["dropout"], "use_rslora": stabilised,
        },
        "train": {
            "learning_rate": goal["learning_rate"], "batch_size": batch, "epochs": epochs, "max_length": length,
            "on_long_row": "skip" if data and length < data["quantiles"]["100"] else "refuse",
            "micro_batch_tokens": micro, "activation_checkpointing": checkpointing,
        },
        "verdicts": _verdicts(facts, table), "fits": fits, "lora_parameters": lora_parameters(model, rank),
        "memory": dataclasses.asdict(parts) | {"peak": parts.peak} if model.fused else None,
    }  # fmt: skip


def _rank(goal: dict, model: ModelFacts, data: dict | None, table: dict) -> int:
    """The smallest rank of the goal that can hold the data, or its last."""
    if data is None:
        return goal["without_data"]
    bits = data["supervised"] * table["bits_per_token"]
    for rank in goal["ranks"]:
        if lora_parameters(model, rank) * table["bits_per_parameter"] >= bits:
            return rank
    return goal["ranks"][-1]


def _lengths(model: ModelFacts, data: dict | None, table: dict) -> list[int]:
    """Length limits to try, the longest first."""
    if data is None:
        return [min(table["length_without_data"], model.positions)]
    found = []
    for q in table["quantiles"]:
        length = min(_padded(data["quantiles"][q], table), model.positions)
        if length not in found:
            found.append(length)
    return found


def _padded(length: int, table: dict) -> int:
    return -(-length // table["alignment"]) * table["alignment"]


def _batch(goal: dict, data: dict | None, table: dict) -> tuple[int, int]:
    """(sequences a step, passes over the data)."""
    if data is None:
        return goal["batch_size"], table["epochs_otherwise"]
    sizes = [size for size in table["batch_sizes"] if size <= goal["batch_size"]]
    batch = next((size for size in sizes if data["rows"] >= size * table["steps_wanted"]), sizes[-1])
    epochs = next((e["epochs"] for e in table["epochs"] if data["rows"] < e["rows_below"]), table["epochs_otherwise"])
    return batch, epochs


def _fitting(facts: dict, wanted: int, lengths: list[int], batch: int, table: dict):
    """(rank, length, tokens of a micro-batch, checkpointing, Memory, fits): the first that fits; the last tried where none does.

    Given up in this order: the micro-batch's size, activations, rank (unless it was asked for), length.
    """
    model, card = facts["model"], facts["card"]
    room = None if card is None or not model.fused else usable(card, table)
    smaller = [] if facts["rank"] else [r for r in reversed(table["ranks"]) if r < wanted]
    for length in lengths:
        row = _padded(length, table)
        for rank in (wanted, *smaller):
            for step in table["ladder"]:
                micro = max(step["tokens"], row)
                parts = memory(model, rank, min(micro, batch * row), step["checkpointing"], table)
                last = (rank, length, micro, step["checkpointing"], parts)
                if room is None or parts.peak <= room:
                    return (*last, True)
    return (*last, False)


def _verdicts(facts: dict, table: dict) -> list[str]:
    data, found = facts["data"], []
    if facts["new_vocabulary"]:
        found.append("new_vocabulary")
    if data and data["bytes_per_token"] < table["least_bytes_per_token"]:
        found.append("unknown_text")
    if data:
        most = lora_parameters(facts["model"], table["ranks"][-1]) * table["bits_per_parameter"]
        if data["supervised"] * table["bits_per_token"] > most:
            found.append("capacity")
    return found


def cards(facts: dict) -> list[dict]:
    """A row a card of the table: what would be decided there, its peak in bytes, and seconds an epoch (None without data)."""
    rows = []
    for card in rules()["cards"]:
        found = decide(facts | {"card": card["gib"] * GIB})
        checkpointing, rank = found["train"]["activation_checkpointing"], found["lora"]["r"]
        seconds = None
        if facts["data"] and found["fits"]:
            seconds = epoch_seconds(facts["model"], facts["data"], rank, checkpointing, card["tflops"], rules())
        rows.append({"gib": card["gib"], "card": card["card"], "seconds_per_epoch": seconds} | found)
    return rows
