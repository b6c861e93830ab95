"""Chats: messages to token ids and the mask of supervised ones, by the tokenizer's own template.

Assistant turns are supervised and nothing else. A template with ``{% generation %}`` marks says
itself where these turns are. For any other, each turn is found by rendering the chat up to it and
through it: the ids of both must be prefixes of the whole chat's ids, otherwise the template writes
a turn differently once more turns follow (some drop earlier reasoning) and the row is refused
rather than trained on something that generation never sees. Either way the supervised tokens are
decoded again and must hold what the assistant said.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import jinja2
import numpy as np

from fastlora.encode import RowError, check_text, end_id, kind_of, tokenize
from fastlora.errors import InputError

# The word alone would do for detection by transformers too; whitespace control may stand on either
# side.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Templates refuse by raise_exception, or trip over a field of a type they did not expect.
REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError)

# What the probe in stop_ids says as the assistant: found again in the rendered text.
_PROBE = "fastloraprobe"


def chat_template(tokenizer) -> str:
    """The tokenizer's chat template.

    Raises:
        InputError: it has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            "the tokenizer has no chat template, which rows with 'messages' need; use a chat model,"
            " or rows with 'prompt' and 'completion'"
        ) from error


def has_generation_marks(tokenizer) -> bool:
    """Whether the template marks assistant turns with ``{% generation %}``."""
    return _GENERATION.search(chat_template(tokenizer)) is not None


def stop_ids(tokenizer, format: str) -> frozenset[int]:
    """The ids at which an answer ends: the end token, and what a chat template ends a turn with.

    A template may close a turn with another token than the tokenizer's end token (Llama 3:
    ``<|eot_id|>``): a chat of one turn is rendered, and the first special token after the
    assistant's words counts too.
    """
    if format != "messages":
        return frozenset({end_id(tokenizer)})
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    chat_template(tokenizer)
    try:
        text = _render(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        )
    except RowError:
        return frozenset(stops)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    tail = text[text.rfind(_PROBE) + len(_PROBE) :]
    places = sorted((tail.find(token), -len(token), token) for token in special if token in tail)
    if places:
        stops.add(int(tokenizer.convert_tokens_to_ids(places[0][2])))
    return frozenset(stops)


def generation_ids(tokenizer, messages: Sequence[dict], tools: list | None = None) -> list[int]:
    """Ids of a chat up to the place where the assistant's next turn begins.

    Raises:
        RowError: the messages are not a chat, or the template refuses them.
        InputError: the tokenizer has no chat template.
    """
    chat_template(tokenizer)
    check_messages(messages)
    return tokenize(tokenizer, _render(tokenizer, messages, tools, add_generation_prompt=True))


def check_messages(messages: object) -> None:
    """Refuse what is no chat.

    A chat is a non-empty list of objects with a 'role' and, unless they call tools, a 'content'.

    Raises:
        RowError: naming the message by its place, counted from 1.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError("bad_format", "'messages' must be a list with at least one message")
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise RowError("bad_format", f"message {place} is {kind_of(message)}; it must be an object")
        check_text(message.get("role"), f"role of message {place}")
        if message.get("content") is None and message.get("tool_calls"):
            continue
        check_text(message.get("content"), f"content of message {place}")
        if (
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
        ):
            raise RowError("empty_completion", f"message {place}, of the assistant, is empty")


def turns_of(messages: Sequence[dict]) -> list[int]:
    """Places of the assistant's messages, counted from 0."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def encode_messages(
    tokenizer, messages: object, tools: list | None = None
) -> tuple[list[int], list[bool]]:
    """A chat as ids and the mask of supervised ones: the assistant's turns with their end tokens.

    White space that a template writes after the end token of a turn is not supervised: generation
        stops before it.

    Returns:
        (ids, supervised), both of one length.

    Raises:
        RowError: no chat, no assistant turn, refused by the template, prefixes that disagree, or
            supervised tokens that do not decode to what the assistant said.
        InputError: the tokenizer has no chat template.
    """
    marked = has_generation_marks(tokenizer)
    check_messages(messages)
    turns = turns_of(messages)
    if not turns:
        raise RowError("no_supervised_token", "no message of the assistant, so no supervised token")
    if marked:
        ids, supervised = _by_marks(tokenizer, messages, tools)
    else:
        ids, supervised = _by_prefixes(tokenizer, messages, tools, turns)
    _check_decoded(tokenizer, messages, ids, supervised)
    return ids, supervised


def _render(tokenizer, messages: Sequence[dict], tools: list | None = None, **options) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)
    except REFUSALS as error:
        raise RowError("template", f"the chat template refuses the messages: {error}") from error


def _by_marks(
    tokenizer, messages: Sequence[dict], tools: list | None
) -> tuple[list[int], list[bool]]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except REFUSALS as error:
        raise RowError("template", f"the chat template refuses the messages: {error}") from error
    return list(encoded["input_ids"]), [bool(on) for on in encoded["assistant_masks"]]


def _by_prefixes(
    tokenizer, messages: Sequence[dict], tools: list | None, turns: list[int]
) -> tuple[list[int], list[bool]]:
    ids = tokenize(tokenizer, _render(tokenizer, messages, tools))
    supervised = [False] * len(ids)

    def decode(token: int, **options) -> str:
        return tokenizer.decode([token], **options)

    for turn in turns:
        if not turn:
            raise RowError(
                "template",
                "message 1 is of the assistant: without {% generation %} marks in the chat template nothing tells where it begins; put a"
                " message of the user before it, or leave it out",
            )
        before = tokenize(
            tokenizer, _render(tokenizer, messages[:turn], tools, add_generation_prompt=True)
        )
        last = turn + 1 == len(messages)
        through = ids if last else tokenize(tokenizer, _render(tokenizer, messages[: turn + 1], tools))
        if (
            ids[: len(before)] != before
            or ids[: len(through)] != through
            or len(through) <= len(before)
        ):
            raise RowError(
                "template",
                f"the chat template writes message {turn + 1} differently alone and in the whole chat"
                " (prefixes disagree); use a template with {% generation %} marks, or end the row"
                " at this message",
            )
        stop = turn_end(decode, ids, len(before), len(through))
        supervised[len(before) : stop] = [True] * (stop - len(before))
    return ids, supervised


def turn_end(decode: Callable[..., str], ids: list[int], before: int, through: int) -> int:
    """Where the supervised tokens of a turn end that lies in ``ids[before:through]``.

    Args:
        decode: one token as text; takes ``skip_special_tokens``.
    """
    stop = through
    while stop > before and not decode(ids[stop - 1]).strip():
        stop -= 1
    # Only white space behind an end token is dropped; without one it may be what ends the turn.
    return through if decode(ids[stop - 1], skip_special_tokens=True) else stop


def _check_decoded(
    tokenizer, messages: Sequence[dict], ids: list[int], supervised: list[bool]
) -> None:
    """Decode the supervised tokens: in them, in order, must stand what each assistant turn says."""
    if not any(supervised):
        raise RowError(
            "no_supervised_token", "the chat template's {% generation %} marks hold no token"
        )
    said = [
        tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
        for start, stop in spans(supervised)
    ]
    number = first_unsaid(messages, said)
    if number:
        raise RowError(
            "template",
            f"the supervised tokens do not decode to what message {number}, of the assistant,"
            " says",
        )


def spans(supervised: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, one past the last) of each run of supervised tokens."""
    on = np.asarray(supervised, bool)
    edges = (np.flatnonzero(on[1:] != on[:-1]) + 1).tolist()
    if on[:1].any():
        edges.insert(0, 0)
    return list(zip(edges[::2], [*edges[1::2], len(on)]))


def first_unsaid(messages: Sequence[dict], said: list[str]) -> int:
    """Which message of the assistant is not found in what the supervised spans decode to, in order.

    Returns:
        its place, counted from 1; 0 if all are there.
    """
    # A separator that cannot glue the end of one turn to the start of the next.
    text = "\n".join(said)
    asked = {
        number: message["content"]
        for number, message in enumerate(messages, start=1)
        if message["role"] == "assistant" and message.get("content") is not None
    }
    # What stands there to the letter stands there without white space too; beyond ASCII, NFKC may join what meets.
    if text.isascii() and not _first_missing(text, asked):
        return 0
    return _first_missing(_squeeze(text), {number: _squeeze(said) for number, said in asked.items()})


def _first_missing(text: str, parts: dict[int, str]) -> int:
    """The key of the first of ``parts`` that does not follow the one before somewhere in ``text``; 0 if all do."""
    place = 0
    for key, part in parts.items():
        found = text.find(part, place)
        if found < 0:
            return key
        place = found + len(part)
    return 0


def _squeeze(text: str) -> str:
    """``text`` in NFKC (tokenizers may normalise) without white space (templates trim, decoders add)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return "".join(text.split())
