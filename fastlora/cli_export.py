"""``fastlora export``: an adapter, or the model with it inside, for other programs."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from fastlora.errors import InputError

FORMATS = ("gguf-lora", "gguf", "vllm")


def export(
    adapter: Annotated[str, typer.Option("--adapter", help="Folder of the adapter.")],
    output: Annotated[str, typer.Option("--output", help="New file (gguf-lora, gguf) or folder (vllm).")],
    format: Annotated[str, typer.Option("--format", help="gguf-lora: the adapter for llama.cpp; gguf: the merged model for "
                                        "llama.cpp; vllm: the adapter as every vLLM release reads it.")] = "gguf-lora",
    model: Annotated[str | None, typer.Option("--model", help="Folder of the base model, or a hub name. [the adapter's own "
                                              "note of it]")] = None,
    gguf_file: Annotated[str | None, typer.Option("--gguf-file", help="GGUF file inside the model's folder.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of matrices in GGUF: float32, float16, bfloat16, and q8_0 for "
                                       "models.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")] = False,
) -> None:
    """Write an adapter, or the model with it inside, for llama.cpp or vLLM."""
    from fastlora.train_config import DTYPE_SHORT

    if format not in FORMATS:
        raise InputError(f"format = {format!r}: allowed are {', '.join(FORMATS)}")
    if format == "vllm":
        from fastlora.vllm_export import export_for_vllm

        lines = export_for_vllm(adapter, output)
    else:
        lines = _gguf(adapter, pathlib.Path(output), format, model, DTYPE_SHORT.get(dtype, dtype),
                      {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code})
    for line in lines:
        typer.echo(line)


def _gguf(adapter: str, output: pathlib.Path, format: str, model: str | None, dtype: str, files: dict) -> list[str]:
    from fastlora import gguf_export, gguf_names, setup
    from fastlora.adapter import load_adapter, read_adapter
    from fastlora.files import check_writable
    from fastlora.inject import eject
    from fastlora.merge import merge

    if output.exists():
        raise InputError(f"output = {str(output)!r}: it exists; allowed is a new file")
    check_writable(output.parent, "output")
    if output.suffix != ".gguf":
        raise InputError(f"output = {str(output)!r}: allowed is a file that ends in .gguf")
    allowed = [name for name in gguf_export.TYPES if format == "gguf" or name != "q8_0"]
    if dtype not in allowed:
        raise InputError(f"dtype = {dtype!r}: allowed for {format} are {', '.join(allowed)}")
    model = model or read_adapter(adapter)[0].base_model_name_or_path
    config = setup.load_config(model, **files)
    gguf_names.family_for(config)  # refused before any weight is read
    if format == "gguf-lora":
        return gguf_export.write_adapter(adapter, output, config, dtype)
    place, gguf_file, _ = setup.find_model(model, files["gguf_file"])
    like = None if gguf_file is None else pathlib.Path(place) / gguf_file
    tokenizer = setup.load_tokenizer(model, **files)
    if like is None:
        gguf_names.pre_tokenizer(tokenizer)
    network = eject(merge(load_adapter(setup.load_model(model, **files), adapter), keep_base=False), keep_merged=True)
    return gguf_export.write_model(network, tokenizer, output, dtype, like)
