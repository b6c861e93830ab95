"""From the text of a row to token ids and the mask of supervised ones: plain text, or a prompt
pair.

Chats (``messages``) are in template.py. Training and generation both call these functions, so that
a prompt has the same ids in both.
"""

from __future__ import annotations

from fastlora.errors import InputError

FORMATS = ("messages", "prompt-completion", "text")


class RowError(InputError):
    """A row that cannot be trained on; ``kind`` (of ``data.KINDS``) says how it is counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def kind_of(value: object) -> str:
    """What a parsed value is, in JSON's words."""
    kinds = (
        (type(None), "null"), (bool, "true or false"), (int | float, "a number"), (str, "a string"), (list | tuple, "a list"),
        (dict, "an object"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def check_text(text: object, field: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can hold.

    Raises:
        RowError: it is no string, or holds half of a surrogate pair (JSON can spell one, UTF-8
            cannot).
    """
    if not isinstance(text, str):
        raise RowError("bad_format", f"'{field}' is {kind_of(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "bad_format", f"'{field}' holds half of a surrogate pair at character {error.start}"
        ) from error
    return text


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold ``text``: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` with nothing added at either end."""
    # verbose=False: the length limit is checked by data.py, which names the line.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_id(tokenizer) -> int:
    """The id of the tokenizer's end token.

    Raises:
        InputError: it has none, so a model trained on its rows would never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end token (eos_token is null); set eos_token in its"
            " tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt: the begin token if the tokenizer has one, then the text.

    There is one begin token, also where the text spells it itself.
    """
    ids = tokenize(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [int(bos), *ids]
    return ids


def encode_pair(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Prompt and completion, one after the other; the completion and one end token are supervised.

    The prompt's ids are those that generation will use. Where tokenizing the joined text begins
    with exactly these ids, the completion keeps the ids it has there; where a token would span the
    border, the completion is tokenized by itself.

    Returns:
        (ids, supervised), both of one length.

    Raises:
        RowError: a field is no string, or the completion is empty or white space.
        InputError: the tokenizer has no end token.
    """
    prompt, completion = check_text(prompt, "prompt"), check_text(completion, "completion")
    if not completion.strip():
        raise RowError("empty_completion", "'completion' is empty")
    end = end_id(tokenizer)
    head = prompt_ids(tokenizer, prompt)
    whole = prompt_ids(tokenizer, prompt + completion)
    tail = whole[len(head) :] if whole[: len(head)] == head else tokenize(tokenizer, completion)
    if tail[-1:] != [end]:
        tail = [*tail, end]
    return head + tail, [False] * len(head) + [True] * len(tail)


def encode_text(tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """Plain text between one begin token (if the tokenizer has one) and one end token.

    All tokens but the first are supervised.

    Returns:
        (ids, supervised), both of one length.

    Raises:
        RowError: no string, or empty or white space.
        InputError: the tokenizer has no end token.
    """
    text = check_text(text, "text")
    if not text.strip():
        raise RowError("empty_completion", "'text' is empty")
    end = end_id(tokenizer)
    ids = prompt_ids(tokenizer, text)
    if ids[-1:] != [end] or len(ids) == 1:
        ids = [*ids, end]
    return ids, [index > 0 for index in range(len(ids))]
