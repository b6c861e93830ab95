"""A merged model as a transformers folder."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

import torch

from fastlora import setup
from fastlora.adapter import load_adapter
from fastlora.errors import InputError
from fastlora.inject import eject
from fastlora.merge import merge
from fastlora.train_config import DTYPE_SHORT, DTYPES


def merge_to_folder(
    model: str, adapter: str | os.PathLike, output: str | os.PathLike, *, gguf_file: str | None = None,
    dtype: str = "auto", trust_remote_code: bool = False,
) -> pathlib.Path:
    """Load base and adapter, merge in float64, write model and tokenizer to a new folder; returns it.

    Args:
        dtype: of the base when it is loaded and of the result; "auto" is that of the base's files.

    Raises:
        InputError: bad model, adapter or dtype, or an output folder that is not empty.
    """
    dtype = DTYPE_SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: allowed are {', '.join(DTYPES)}")
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output = {str(output)!r}: it holds files; allowed is a new or empty folder")
    files = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    tokenizer = setup.load_tokenizer(model, **files)
    loaded = setup.load_model(model, dtype="auto" if dtype == "auto" else getattr(torch, dtype), **files)
    load_adapter(loaded, adapter)
    eject(merge(loaded), keep_merged=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: written beside the place, then renamed.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        loaded.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.replace(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output
