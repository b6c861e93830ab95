"""Text from a model, with or without an adapter: greedy or sampled, in the format it was trained
on.

Prompts become the same token ids as in training (encode.py, template.py), and generation stops
where training rows end. One sequence at a time, with the model's own key-value cache.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from fastlora import encode, template
from fastlora.errors import InputError, TrainingError
from fastlora.rundir import RUN, read_run

# What an unfinished UTF-8 sequence decodes to: text that ends in it is held back until the rest
# comes.
_REPLACEMENT = "\ufffd"


def stored_format(adapter: str | os.PathLike) -> str | None:
    """The data format an adapter was trained on, from the ``run.toml`` beside it; None if there is
    no such file.

    ``adapter_config.json`` stays exactly PEFT's, so the format is kept in the run's own file.

    Raises:
        InputError: the file is there and cannot be read, or names no known format.
    """
    if not os.path.isfile(os.path.join(adapter, RUN)):
        return None
    format = read_run(adapter).get("data", {}).get("format")
    if format not in encode.FORMATS:
        raise InputError(
            f"{os.path.join(adapter, RUN)}: format is {format!r};"
            f" allowed are {', '.join(encode.FORMATS)}"
        )
    return format


def generate(
    model: torch.nn.Module,
    tokenizer,
    prompt: str | Sequence[dict],
    *,
    format: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
) -> str:
    """Continue a prompt, or answer a chat, until an end token or ``max_new_tokens``.

    Args:
        model: a transformers causal language model; runs in evaluation mode, and is put back after.
        tokenizer: its tokenizer.
        prompt: text, or messages (objects with 'role' and 'content').
        format: one of ``encode.FORMATS``, as the adapter was trained (:func:`stored_format`). None
            takes "messages" for messages and "prompt-completion" for text. Text under "messages" is
            one turn of the user.
        max_new_tokens: at least 1; fewer are made where the model's positions run out.
        temperature: 0 takes the most likely token (the first among equals); above 0 samples from
            softmax(logits / temperature).
        seed: of the sampling.
        stream: called with each piece of text as it comes; the pieces joined are the result.

    Returns:
        The new text, without special tokens.

    Raises:
        InputError: an argument out of range, an empty prompt, or one that fills all positions.
        TrainingError: a logit that is NaN (or no finite one).
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature is {temperature}; it must be 0 (greedy) or a finite number above it"
        )
    ids, format = prompt_tokens(tokenizer, prompt, format)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        if len(ids) >= positions:
            raise InputError(f"prompt has {len(ids)} tokens; the model has {positions} positions")
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    stops = _stops(model, tokenizer, format)
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    said = ""
    with _evaluation(model), torch.no_grad():
        for token in _tokens(model, ids, temperature, generator):
            if token in stops:
                break
            new.append(token)
            if stream is not None:
                text = _decode(tokenizer, new)
                if (
                    text.startswith(said)
                    and len(text) > len(said)
                    and not text.endswith(_REPLACEMENT)
                ):
                    stream(text[len(said) :])
                    said = text
            if len(new) == max_new_tokens:
                break
    text = _decode(tokenizer, new)
    if stream is not None and text.startswith(said) and len(text) > len(said):
        stream(text[len(said) :])
    return text


def converse(model: torch.nn.Module, tokenizer, turns: Iterable[str], **settings) -> Iterator[str]:
    """Answer one user turn after the other, each with all that was said before; yields each answer once it is complete.

    Args:
        turns: the user's, taken one by one as they are needed.
        settings: of :func:`generate`, whose errors are raised here too.
    """
    said: list[dict] = []
    for turn in turns:
        said.append({"role": "user", "content": turn})
        answer = generate(model, tokenizer, said, **settings)
        # A turn that was answered with nothing is taken back: chats have no empty turns of the assistant.
        if answer.strip():
            said.append({"role": "assistant", "content": answer})
        else:
            said.pop()
        yield answer


def lines(source: Iterable[str], ask: Callable[[], object]) -> Iterator[str]:
    """Lines without their ends, empty ones left out; ``ask`` is called before each is waited for."""
    ask()
    for line in source:
        if line.strip():
            yield line.strip()
        ask()


def prompt_tokens(
    tokenizer, prompt: str | Sequence[dict], format: str | None = None
) -> tuple[list[int], str]:
    """Token ids of what generation starts from, and the format that was taken (see
    :func:`generate`).

    Raises:
        InputError: an unknown format, messages under a format of text, or a prompt of no token.
    """
    if format is None:
        format = "prompt-completion" if isinstance(prompt, str) else "messages"
    if format not in encode.FORMATS:
        raise InputError(f"format is {format!r}; allowed are {', '.join(encode.FORMATS)}")
    if format == "messages":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = template.generation_ids(tokenizer, messages)
    elif isinstance(prompt, str):
        ids = encode.prompt_ids(tokenizer, encode.check_text(prompt, "prompt"))
    else:
        raise InputError(f"prompt is a list of messages, and the format is {format}; give text")
    if not ids:
        raise InputError(
            "prompt is empty and the tokenizer has no begin token; give at least one token"
        )
    return ids, format


def _stops(model: torch.nn.Module, tokenizer, format: str) -> set[int]:
    """Where an answer ends: as training rows do, and where the model's own settings say so."""
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if format == "messages":
        stops |= template.stop_ids(tokenizer, format)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is not None:
        stops |= set(own) if isinstance(own, list | tuple) else {int(own)}
    return stops


def _tokens(
    model: torch.nn.Module, ids: list[int], temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """New token ids, one after the other, without end."""
    device = next(model.parameters()).device
    # transformers 5.24 renamed the argument and the field of the output.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given, cache = torch.tensor([ids], device=device), None
    while True:
        # logits_to_keep: of a long prompt only the last row is projected onto the vocabulary.
        out = model(input_ids=given, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = getattr(out, name)
        logits = out.logits[0, -1].float().cpu()
        if torch.isnan(logits).any() or not torch.isfinite(logits.max()):
            raise TrainingError(
                "generate: the model's logits are not finite; a weight or the adapter holds NaN"
            )
        if temperature == 0:
            token = int(torch.argmax(logits))
        else:
            chances = torch.softmax(logits.double() / temperature, dim=0)
            token = int(torch.multinomial(chances, 1, generator=generator))
        yield token
        given = torch.tensor([[token]], device=device)


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
