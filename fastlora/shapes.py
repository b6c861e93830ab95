"""The shapes in which people keep training rows, and what each becomes: a chat, a pair, or plain text.

==================  ==========================================  =========================================
shape               fields                                      is trained as
==================  ==========================================  =========================================
messages            ``messages`` (``role``, ``content``)        a chat by the tokenizer's template
conversations       ``conversations`` (``from``, ``value``)     the same; ShareGPT's names for it
instruction         ``instruction``, ``input``, ``output``      Alpaca: a chat where the tokenizer has a chat
                                                                template, else Alpaca's own prompt and answer
prompt-completion   ``prompt``, ``completion``                  the completion after the prompt
text                ``text``                                    every token
==================  ==========================================  =========================================

The Alpaca prompt is that of Taori et al., Stanford Alpaca (2023).
"""

from __future__ import annotations

from fastlora import encode, template
from fastlora.encode import RowError, check_text, kind_of

# Shape: the keys that make it complete. One of these alone must be complete in a row.
SHAPES = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
# How a run's first lines call a shape.
NAMES = {
    "messages": "messages",
    "conversations": "conversations with from and value, ShareGPT",
    "instruction": "instruction, input and output, Alpaca",
    "prompt-completion": "prompt-completion",
    "text": "text",
}
# ShareGPT's speakers, and those of data sets made in its manner.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool",
}
_ALPACA = ("Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the "
           "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n")


def shape_of(record: object) -> str:
    """Which of ``SHAPES`` a parsed row has; other keys beside a complete shape are not looked at.

    Raises:
        RowError: it is no object, has the fields of no shape, half of one, or of more than one.
    """
    if not isinstance(record, dict):
        raise RowError("bad_format", f"{kind_of(record)}, not an object")
    found = [shape for shape, keys in SHAPES.items() if all(key in record for key in keys)]
    if len(found) == 1:
        return found[0]
    if not found:
        for shape, keys in SHAPES.items():
            have = [key for key in keys if key in record]
            if have:
                missing = next(key for key in keys if key not in record)
                raise RowError("bad_format", f"no '{missing}' beside the other of {' and '.join(SHAPES[shape])}")
    keys = ", ".join(sorted(map(str, record))[:8]) or "none"
    what = "fields of more than one format" if found else "no known field"
    raise RowError("bad_format", f"{what} (its keys: {keys}); give 'messages', 'conversations', 'instruction' and "
                                 "'output', 'prompt' and 'completion', or 'text'")


def format_of(shape: str, tokenizer) -> str:
    """Which of ``encode.FORMATS`` the rows of a shape are trained in by ``tokenizer``."""
    if shape == "conversations":
        return "messages"
    if shape == "instruction":
        return "messages" if getattr(tokenizer, "chat_template", None) else "prompt-completion"
    return shape


def encode_record(record: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and the mask of supervised tokens of one parsed row, by its :func:`shape_of`.

    Raises:
        RowError: the row cannot be used. InputError: the tokenizer cannot serve any row of this shape.
    """
    shape = shape_of(record)
    if shape == "prompt-completion":
        return encode.encode_pair(tokenizer, record["prompt"], record["completion"])
    if shape == "text":
        return encode.encode_text(tokenizer, record["text"])
    if shape == "instruction" and format_of(shape, tokenizer) != "messages":
        return encode.encode_pair(tokenizer, *alpaca_pair(record))
    return template.encode_messages(tokenizer, *chat_of(record, shape))


def chat_of(record: dict, shape: str) -> tuple[object, list | None]:
    """(messages, tools) of a row whose :func:`shape_of` is trained as a chat; the messages are not checked.

    Raises:
        RowError: the row cannot be read as messages.
    """
    messages = {"messages": _messages, "conversations": sharegpt_messages, "instruction": alpaca_messages}[shape](record)
    return messages, record.get("tools") or None


def _messages(record: dict) -> object:
    return record["messages"]


def sharegpt_messages(record: dict) -> list[dict]:
    """A ShareGPT conversation as messages; ``role`` and ``content`` are understood there too.

    Raises:
        RowError: a turn that is no object, or a speaker that is not in ``SPEAKERS``; named by its place from 1.
    """
    turns = record["conversations"]
    if not isinstance(turns, list | tuple):
        raise RowError("bad_format", f"'conversations' is {kind_of(turns)}; it must be a list")
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for place, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError("bad_format", f"turn {place} is {kind_of(turn)}; it must be an object")
        speaker = turn.get("from", turn.get("role"))
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError("bad_format", f"turn {place} is from {speaker!r}; known are {', '.join(SPEAKERS)}")
        messages.append({"role": role, "content": turn.get("value", turn.get("content"))})
    return messages


def alpaca_messages(record: dict) -> list[dict]:
    """An Alpaca row as a chat: the instruction, and the input below it if there is one, are the user's turn.

    ``system`` and ``history`` (pairs of earlier turns) are understood as LLaMA-Factory writes them.

    Raises:
        RowError: a field that is no string, an empty output, or a history that is no list of pairs.
    """
    instruction, extra, output = _alpaca_texts(record)
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("bad_format", "'history' must be a list of pairs of an instruction and its answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def alpaca_pair(record: dict) -> tuple[str, str]:
    """An Alpaca row as prompt and completion, in Alpaca's own words.

    Raises:
        RowError: a field that is no string, or ``system`` or ``history``, which that prompt has no place for.
    """
    instruction, extra, output = _alpaca_texts(record)
    for name in ("system", "history"):
        if record.get(name):
            raise RowError("bad_format", f"'{name}' has no place in Alpaca's prompt, which is used because the tokenizer "
                                         "has no chat template")
    return _ALPACA.format(instruction=instruction, input=f"### Input:\n{extra}\n\n" if extra else "",
                          and_input=", paired with an input that provides further context" if extra else ""), output


def _alpaca_texts(record: dict) -> tuple[str, str, str]:
    extra = record.get("input")
    texts = check_text(record["instruction"], "instruction"), check_text(extra or "", "input")
    output = check_text(record["output"], "output")
    if not output.strip():
        raise RowError("empty_completion", "'output' is empty")
    return (*texts, output)
