"""A merged model as a transformers folder, with the certificate of the merge."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

import torch

from fastlora import certificate, setup
from fastlora.adapter import load_adapter
from fastlora.certificate import Certificate
from fastlora.digest import digest, frozen_tensors
from fastlora.errors import InputError
from fastlora.files import check_writable, ordinary_mode
from fastlora.inject import eject, lora_layers
from fastlora.merge import merge
from fastlora.train_config import DTYPE_SHORT, DTYPES


def merge_to_folder(
    model: str, adapter: str | os.PathLike, output: str | os.PathLike, *, gguf_file: str | None = None,
    dtype: str = "auto", probe_text: str = certificate.PROBE_TEXT, max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> tuple[pathlib.Path, Certificate]:
    """Load base and adapter, merge in float64, write model, tokenizer and certificate to a new folder.

    Args:
        dtype: of the base when it is loaded and of the result; "auto" is that of the base's files. "float32" keeps all
            but 2^-24 of the sum, whatever the base is stored in.
        probe_text: what the logits are compared on.
        max_shard_size: of one safetensors file, as transformers reads it.

    Returns:
        The folder, and the certificate that ``merge_certificate.json`` in it holds.

    Raises:
        InputError: bad model, adapter, dtype or probe text, or an output folder that is not empty.
        TrainingError: a written weight is further from W + s B A than rounding allows. No folder is left then.
    """
    dtype = DTYPE_SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: allowed are {', '.join(DTYPES)}")
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output = {str(output)!r}: it holds files; allowed is a new or empty folder")
    check_writable(output.parent, "output")
    files = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    tokenizer = setup.load_tokenizer(model, **files)
    ids = certificate.probe_ids(tokenizer, probe_text)
    loaded = setup.load_model(model, dtype="auto" if dtype == "auto" else getattr(torch, dtype), **files)
    load_adapter(loaded, adapter)
    digests = {"base": digest(frozen_tensors(loaded)), "adapter": digest(loaded)}
    beside = certificate.probe_logits(loaded, ids)
    merge(loaded)
    logits = certificate.logit_change(probe_text, beside, certificate.probe_logits(loaded, ids))
    layers = list(lora_layers(loaded))  # what the base was stays with them
    eject(loaded, keep_merged=True)
    digests["merged"] = digest(frozen_tensors(loaded))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: written beside the place, then renamed.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with setup.quiet():
            loaded.save_pretrained(temporary, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(temporary)
        done = Certificate(digests, certificate.tensor_roundings(layers, temporary), logits,
                           certificate.file_hashes(temporary))
        done.write(temporary)
        for path in temporary.iterdir():  # safetensors makes files private
            path.chmod(ordinary_mode())
        # and so does mkdtemp with folders, which need the right to be entered wherever they may be read
        mode = ordinary_mode()
        temporary.chmod(mode | 0o700 | (mode & 0o444) >> 2)
        temporary.replace(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output, done
