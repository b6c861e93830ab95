"""What a run stands on: device and dtype, the model and its tokenizer from a folder, the loss.

Nothing is fetched unless the model's name asks for it, no code from a model's folder runs unless asked to,
and weights in pickle files are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import platform
import re
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError
from torch import nn

from fastlora import weights
from fastlora.errors import InputError
from fastlora.families import Head, head_of
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from fastlora.ops.reference import ALIGN_BYTES
from fastlora.packing import MicroBatch
from fastlora.train_config import TrainConfig

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def choose_device(name: str) -> tuple[torch.device, str | None]:
    """The device for "auto", "cuda" or "cpu", and a line to print about it, or None.

    Raises:
        InputError: "cuda" on a machine without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda': no CUDA device is here; allowed are cpu and auto")
    if name == "cpu" or not torch.cuda.is_available():
        note = None
        if name == "auto" and platform.system() == "Darwin":
            note = "device: CPU, because exact sums need float64, which torch lacks on Apple's GPUs"
        return torch.device("cpu"), note
    return torch.device("cuda", torch.cuda.current_device()), None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base model's dtype; "auto" is bf16 on CUDA (fp16 on a GPU without bf16) and fp32 on CPU.

    Raises:
        InputError: bfloat16 asked for on a GPU without it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if has_bf16 else torch.float16
    if name == "bfloat16" and not has_bf16:
        raise InputError("dtype = 'bfloat16': this GPU has no bf16 arithmetic; allowed are float16, float32")
    return getattr(torch, name)


def device_line(model: nn.Module, device: torch.device) -> str:
    """One line: device, whose kernels, dtype, and on CPU the threads and the instruction set."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"device: {torch.cuda.get_device_name(device)}, fastlora's Triton kernels, {dtype}"
    return (f"device: CPU, {torch.get_num_threads()} threads, torch reference path, {dtype}, "
            f"{torch.backends.cpu.get_cpu_capability()}")


def find_model(name: str | None, gguf_file: str | None) -> tuple[str, str | None, bool]:
    """Where a model's files are: (folder or hub name, GGUF file or None, whether it may be fetched).

    A folder is a folder. ``owner/name`` is a name on the Hugging Face hub if no folder ``owner`` stands here.
    A folder without ``config.json`` but with one ``.gguf`` file is read from that.

    Raises:
        InputError: no name, no such folder, or a folder without a model in it.
    """
    if not name:
        raise InputError("model = None: give a folder with a model (or a hub name like owner/name)")
    folder = pathlib.Path(name)
    if folder.is_file():
        raise InputError(f"model = {name!r}: it is a file; allowed is the folder it lies in"
                         + (f" with gguf_file = {folder.name!r}" if folder.suffix == ".gguf" else ""))
    if not folder.is_dir():
        owner = pathlib.Path(name.partition("/")[0])
        if _HUB_NAME.fullmatch(name) and not owner.exists():
            return name, gguf_file, True
        raise InputError(f"model = {name!r}: no such folder; allowed is a folder with a model, or a hub name "
                         "like owner/name, which is then fetched")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(f"model = {name!r}: the folder cannot be read ({error.strerror})") from error
    if gguf_file is None and "config.json" not in names:
        files = [n for n in names if n.endswith(".gguf")]
        if len(files) != 1:
            have = f"{len(files)} GGUF files; give gguf_file" if files else "no GGUF file"
            raise InputError(f"model = {name!r}: the folder has no config.json and {have}")
        gguf_file = files[0]
    if gguf_file is not None and gguf_file not in names:
        raise InputError(f"gguf_file = {gguf_file!r}: no such file in {name!r}")
    return name, gguf_file, False


def load_tokenizer(name: str | None, *, gguf_file: str | None = None, trust_remote_code: bool = False):
    """The tokenizer of a model (see :func:`find_model`).

    Raises:
        InputError: it cannot be read.
    """
    return _read("tokenizer", "AutoTokenizer", name, gguf_file, trust_remote_code)


def load_config(name: str | None, *, gguf_file: str | None = None, trust_remote_code: bool = False):
    """The transformers configuration of a model (see :func:`find_model`); no weight is read.

    Raises:
        InputError: it cannot be read.
    """
    return _read("configuration", "AutoConfig", name, gguf_file, trust_remote_code)


def _read(what: str, auto: str, name: str | None, gguf_file: str | None, trust_remote_code: bool):
    """What the ``auto`` class of transformers reads from a model's folder."""
    import transformers

    place, gguf_file, fetch = find_model(name, gguf_file)
    with reading(what, place):
        return getattr(transformers, auto).from_pretrained(
            place, local_files_only=not fetch, trust_remote_code=trust_remote_code,
            **({"gguf_file": gguf_file} if gguf_file else {}),
        )


def load_model(
    name: str | None, *, gguf_file: str | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model of a folder, in ``dtype`` on ``device``.

    Raises:
        InputError: it cannot be read, is no causal language model, lacks weights (transformers would draw
            them at random and only warn), or needs code from its folder.
    """
    import transformers

    place, gguf_file, fetch = find_model(name, gguf_file)
    if gguf_file is not None:
        for package in ("gguf", "accelerate"):
            _require(package, f"model = {place!r}: reading a GGUF file needs the package {package}; "
                              "pip install 'fastlora[demo]'")
    with reading("model", place):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, local_files_only=not fetch, trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}),
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"model = {place!r}: {len(missing)} weights are missing from its files "
                         f"({', '.join(missing[:3])}); they would be random")
    if gguf_file is not None:
        _not_quantised(model)
    return _aligned(model.to(device))


def _not_quantised(model: nn.Module) -> None:
    """Weights read from GGUF are plain floats by now; the mark that transformers leaves on them forbids saving the model."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def _aligned(model: nn.Module) -> nn.Module:
    """Move weights that begin off a 64-byte line (as those read from GGUF do): the CPU path would copy them at every use."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGN_BYTES:
            parameter.data = parameter.data.clone()
    return model


def load(config: TrainConfig, say: Callable[[str], object] = lambda line: None) -> tuple[nn.Module, object]:
    """The (model, tokenizer) that a run's settings name, on its device; ``say`` gets a line about the device, if any.

    Raises:
        InputError: see :func:`load_model` and :func:`choose_device`.
    """
    device, note = choose_device(config.device)
    if note:
        say(note)
    files = {"gguf_file": config.gguf_file, "trust_remote_code": config.trust_remote_code}
    dtype = choose_dtype(config.dtype, device)
    if config.dtype == "auto" and dtype == torch.float16:
        say("dtype: float16, because this GPU has no bf16 arithmetic; a gradient_scale of 2**10 or so keeps small gradients")
    tokenizer = load_tokenizer(config.model, **files)
    return load_model(config.model, dtype=dtype, device=device, **files), tokenizer


@contextlib.contextmanager
def reading(what: str, place: str) -> Iterator[None]:
    """Turn what transformers raises on a bad folder into one line that names the folder."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
            SafetensorError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            text = "it needs code of its own; --trust-remote-code runs it, if you trust that code"
        raise InputError(f"model = {place!r}: its {what} cannot be read: {text[:400]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and notes, inside the block alone: they would stand between our lines, and what matters is
    checked and raised."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # GGUF files are read under a bar of tqdm's own, which transformers' settings do not turn off.
    bar = getattr(reader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:
        reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require(package: str, message: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise InputError(message)


def longest_row(model: nn.Module, asked: int | None) -> int | None:
    """The most tokens a row may have: what was asked for, or the model's number of positions.

    Raises:
        InputError: more was asked for than the model has positions.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if asked is not None and most is not None and asked > most:
        raise InputError(f"max_length = {asked}: allowed is at most {most}, the model's number of positions")
    return asked if asked is not None else most


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The loss of one micro-batch.

    Attributes:
        total: scalar with a gradient: the *sum* of the supervised tokens' losses, z-loss included, each times its
            document's weight.
        documents: that sum for each document of the stream, detached, float64 [documents].
        supervised: tokens counted.
        gradient_scale: by what :meth:`backward` multiplies the sum.
    """

    total: torch.Tensor
    documents: torch.Tensor
    supervised: int
    gradient_scale: float = 1.0

    def backward(self) -> None:
        """The backward pass of ``total`` times ``gradient_scale``, on the calling thread: the one that autograd keeps for a GPU would
        find the forward's objects in no cache, and its launches take half as long again."""
        with torch.autograd.set_multithreading_enabled(False):
            (self.total * self.gradient_scale).backward()


class Objective:
    """The summed next-token loss of a model over one stream.

    Families with a known head never hold their logits; any other model is asked for its logits. Use it
    inside ``with fastlora.stream.use(micro_batch.stream)``.

    Args:
        model: a causal language model.
        label_smoothing, z_loss: see :func:`fastlora.ops.linear_cross_entropy.linear_cross_entropy`.
        weighted: whether the documents' weights count.
        gradient_scale: a power of two, by which ``backward`` of the losses multiplies them.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, z_loss: float = 0.0, weighted: bool = True,
                 gradient_scale: float = 1.0) -> None:
        self.model, self.label_smoothing, self.z_loss, self.weighted = model, label_smoothing, z_loss, weighted
        self.gradient_scale = gradient_scale
        self.head: Head | None = head_of(model)

    def plain(self) -> Objective:
        """The same model's cross-entropy alone, as held-out data is judged by."""
        return Objective(self.model, weighted=False)

    def __call__(self, batch: MicroBatch) -> BatchLoss:
        """The loss of ``batch``, whose tensors lie on the model's device."""
        given = batch.weights if self.weighted else None
        if self.head is None:
            logits = self.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
            loss = _loss_of_logits(logits[0], batch, given, self.label_smoothing, self.z_loss)
            return dataclasses.replace(loss, gradient_scale=self.gradient_scale)
        hidden = self.head.decoder(batch.input_ids, batch.position_ids, use_cache=False)[0]
        lora = None
        if self.head.lora is not None:
            of_rows = None if given is None else weights.by_row(batch.stream, given, hidden.device)
            lora = self.head.lora.in_loss(hidden, of_rows, self.gradient_scale)
        if given is not None and lora is None:
            hidden = weights.weigh_gradient(hidden, batch.stream, given)
        record = LossRecord()
        total, supervised = linear_cross_entropy(
            hidden, self.head.weight, batch.labels, softcap=self.head.softcap,
            logit_scale=self.head.logit_scale, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            record=record, chosen=batch.chosen, lora=lora,
        )
        if given is None:
            return BatchLoss(total, record.documents, supervised, self.gradient_scale)
        documents = record.documents * torch.tensor(given, dtype=torch.float64, device=record.documents.device)
        return BatchLoss(total + (documents.sum() - total).detach(), documents, supervised, self.gradient_scale)

    def not_exact(self) -> list[tuple[str, str]]:
        """(module, reason) of what this class itself does not make independent of the split."""
        if self.head is not None:
            return []
        return [("lm_head", f"model type {getattr(self.model.config, 'model_type', '?')!r} is not in the "
                            "table of families; the loss is torch's own over its logits")]


def _loss_of_logits(
    logits: torch.Tensor, batch: MicroBatch, given: tuple[float, ...] | None, label_smoothing: float, z_loss: float
) -> BatchLoss:
    """:class:`BatchLoss` from logits [T, V], document by document."""
    losses = []
    for number, (start, stop) in enumerate(batch.stream.spans):
        labels = batch.labels[start:stop]
        kept = labels != -100
        rows = logits[start:stop][kept].float()
        loss = nn.functional.cross_entropy(rows, labels[kept], reduction="sum", label_smoothing=label_smoothing)
        if z_loss:
            loss = loss + z_loss * rows.logsumexp(1).square().sum()
        losses.append(loss.double() * (1.0 if given is None else given[number]))
    documents = torch.stack(losses)
    return BatchLoss(documents.sum(), documents.detach(), batch.supervised)
