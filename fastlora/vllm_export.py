"""An adapter as every vLLM release reads it: one rank, one scaling, target names in a list.

vLLM takes PEFT's two files. What it refuses (DoRA, biases, modules_to_save, a changed base) this library never writes. Ranks and
scalings of single layers (``rank_pattern``, ``alpha_pattern``) are read by newer releases and *ignored* by older ones, which then
scale wrongly without a word: here they are taken out of the configuration and put into the tensors. Source: vLLM's
``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import torch

from fastlora.adapter import read_adapter, refuse_experts, split_copies, write_files
from fastlora.digest import PREFIX
from fastlora.errors import InputError
from fastlora.files import check_writable

# What --max-lora-rank may be.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_for_vllm(adapter: str | os.PathLike, output: str | os.PathLike) -> list[str]:
    """Write the adapter into a new folder for vLLM; returns lines that say what to start it with.

    Layers of a smaller rank are filled up with zero rows of A and zero columns of B, which changes no product; where a layer has
    another scaling than the first, the ratio goes into B, rounded once to fp32.

    Raises:
        InputError: an adapter that cannot be read or is on expert weights, or a folder that holds files.
    """
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output = {str(output)!r}: it holds files; allowed is a new or empty folder")
    check_writable(output, "output")
    config, tensors = read_adapter(adapter)
    tensors, _ = split_copies(tensors)
    refuse_experts(config, "format vllm")
    paths = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    rank = max(config.rank_for(path) for path in paths)
    scaling = config.scaling_for(paths[0])
    found, folded = {}, []
    for path in paths:
        a, b = (tensors[f"{PREFIX}{path}.{name}.weight"].float() for name in ("lora_A", "lora_B"))
        more, ratio = rank - config.rank_for(path), config.scaling_for(path) / scaling
        if ratio != 1:
            folded.append(path)
            b = (b.double() * ratio).float()
        found[f"{PREFIX}{path}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        found[f"{PREFIX}{path}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    plain = not (config.rank_pattern or config.alpha_pattern)
    alpha = config.lora_alpha if plain else scaling * rank
    flat = dataclasses.replace(
        config, r=rank, lora_alpha=alpha, use_rslora=config.use_rslora and plain, rank_pattern={}, alpha_pattern={},
        target_modules=sorted({path.rpartition(".")[2] for path in paths}), exclude_modules=None, layers_to_transform=None,
        layers_pattern=None, init_lora_weights=True,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_files(output, flat, dict(sorted(found.items())))
    allowed = next(size for size in MAX_RANKS if size >= rank)
    lines = [f"{output}: adapter of rank {rank} for vLLM",
             f"start it with --enable-lora --max-lora-rank {allowed} --lora-modules NAME={output}"]
    if not plain:
        lines.append("ranks and scalings of single layers are in the tensors now"
                     + (f"; B of {len(folded)} layers was multiplied and rounded once (first {folded[0]})" if folded else ""))
    return lines
