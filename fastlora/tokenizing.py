"""A task of a data file to token arrays, in whichever process: parsed, checked, encoded; what is wrong is counted and kept."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from fastlora import template, weights
from fastlora.chats import Encoded, encode_chats
from fastlora.encode import RowError, is_utf8
from fastlora.shapes import alpaca_pair, chat_of, encode_record, format_of, shape_of
from fastlora.sources import Task, parse, records
from fastlora.token_rows import IDS, INDEX, MASK, make_row


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How every row of a data set is encoded.

    Attributes:
        tokenizer: a transformers tokenizer. shape: of ``shapes.SHAPES``, that of the first row; "" if no row has one.
        max_length, on_long_row: see :func:`fastlora.data.read_rows`.
    """

    tokenizer: object
    shape: str
    max_length: int | None
    on_long_row: str


@dataclasses.dataclass
class Piece:
    """What a task came to.

    Attributes:
        ids: int32 [T]. mask: uint8 [T]. index: ``token_rows.INDEX`` [n], ends counted from 0 here.
        counts: of lines, blank, truncated, ends_lost, without_end, supervised.
        problems: (number, begin, kind, message) of rows not used.
    """

    ids: np.ndarray
    mask: np.ndarray
    index: np.ndarray
    counts: Counter
    problems: list[tuple[int, int, str, str]]


class Ahead:
    """A tokenizer that has seen some texts already, many in one call: a call for each costs more than short texts do.

    Ids are those of single calls; a text it has not seen goes to the tokenizer, and is remembered until the next row.
    """

    def __init__(self, tokenizer, texts: list[str]) -> None:
        self._tokenizer, self._row, self._ready = tokenizer, {}, {}
        self.see(texts)

    def see(self, texts: list[str]) -> None:
        """Tokenize more texts in one call."""
        texts = [text for text in dict.fromkeys(texts) if text not in self._ready and is_utf8(text)]
        if texts:
            found = self._tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False,
                                    return_token_type_ids=False)
            self._ready |= zip(texts, found["input_ids"])

    def begins(self, whole: str, head: str) -> bool:
        """Whether the ids of a text it has seen begin with those of another."""
        ids = self._ready[head]
        return self._ready[whole][: len(ids)] == ids

    def next_row(self) -> None:
        """Forget the texts of the row before."""
        self._row = {}

    def __call__(self, text: str, **options) -> dict:
        ready = self._ready.get(text, self._row.get(text))
        if ready is None:
            ready = self._row[text] = list(self._tokenizer(text, **options)["input_ids"])
        return {"input_ids": ready}

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)


def seen_ahead(shape: str, values: list, tokenizer) -> Ahead:
    """A tokenizer that has seen what encoding these rows will ask for; for chats see :func:`chats_ahead`."""
    if shape == "text":
        texts = [value.get("text") for value in values if isinstance(value, dict)]
        return Ahead(tokenizer, [text for text in texts if isinstance(text, str)])
    if format_of(shape, tokenizer) != "prompt-completion":
        return Ahead(tokenizer, [])
    pairs = [pair for value in values if (pair := _pair(shape, value))]
    ahead = Ahead(tokenizer, [text for prompt, completion in pairs for text in (prompt, prompt + completion)])
    # Where a token would span the border, the completion is tokenized by itself (see encode.encode_pair).
    ahead.see([completion for prompt, completion in pairs if not ahead.begins(prompt + completion, prompt)])
    return ahead


def chats_ahead(shape: str, values: list, tokenizer) -> list[Encoded | None]:
    """Of each row that is a chat its ids and mask, encoded with the others; None for one that has to be encoded alone.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    found: list[Encoded | None] = [None] * len(values)
    if shape and format_of(shape, tokenizer) == "messages":
        chats = {place: chat for place, value in enumerate(values) if (chat := _chat(shape, value))}
        for place, encoded in zip(chats, encode_chats(tokenizer, chats.values())):
            found[place] = encoded
    return found


def _chat(shape: str, value: object) -> tuple | None:
    """The messages and tools of a row of this shape, else None."""
    try:
        return chat_of(value, shape) if shape_of(value) == shape else None
    except RowError:
        return None


def _pair(shape: str, value: object) -> tuple[str, str] | None:
    """The prompt and completion of a row that has them whole, else None."""
    if not isinstance(value, dict):
        return None
    try:
        pair = alpaca_pair(value) if shape == "instruction" else (value["prompt"], value["completion"])
    except (RowError, KeyError):
        return None
    return pair if all(isinstance(text, str) and is_utf8(text) for text in pair) else None


def encode_task(task: Task, encoding: Encoding) -> Piece:
    """Every row of ``task``, encoded.

    Raises:
        InputError: the tokenizer can serve no row (no end token, no chat template), or the file is damaged.
    """
    counts: Counter = Counter(lines=0, blank=0)
    found, problems = [], []
    for number, begin, raw in records(task):
        counts["lines"] += 1
        if isinstance(raw, bytes) and not raw.strip():
            counts["blank"] += 1
            continue
        try:
            found.append((number, begin, parse(raw)))
        except RowError as error:
            problems.append((number, begin, error.kind, str(error)))
    tokenizer = seen_ahead(encoding.shape, [value for *_, value in found], encoding.tokenizer)
    ends = frozenset()
    if found and encoding.shape:
        ends = template.stop_ids(encoding.tokenizer, format_of(encoding.shape, encoding.tokenizer))
    chats = chats_ahead(encoding.shape, [value for *_, value in found], encoding.tokenizer)
    rows = []
    for (number, begin, value), chat in zip(found, chats):
        tokenizer.next_row()
        try:
            rows.append((number, begin, _row(value, chat, tokenizer, encoding, ends, counts)))
        except RowError as error:
            problems.append((number, begin, error.kind, str(error)))
    problems.sort(key=lambda problem: problem[0])
    index = np.zeros(len(rows), INDEX)
    index["end"] = np.cumsum([len(row) for *_, row in rows])
    index["key"] = [row.key for *_, row in rows]
    index["number"], index["begin"] = [r[0] for r in rows], [r[1] for r in rows]
    index["file"], index["weight"] = task.file, [row.weight for *_, row in rows]
    none = np.zeros(0, np.int32)
    ids = np.concatenate([row.input_ids for *_, row in rows] or [none]).astype(IDS)
    mask = (np.concatenate([row.labels for *_, row in rows] or [none]) >= 0).astype(MASK)
    counts["supervised"] = int(mask.sum())
    return Piece(ids, mask, index, counts, problems)


def _row(value: object, chat: Encoded | None, tokenizer, encoding: Encoding, ends: frozenset[int], counts: Counter):
    shape = shape_of(value)
    if shape != encoding.shape:
        raise RowError("bad_format", f"format {shape} in a file whose first row is {encoding.shape}; use one format a file")
    ids, supervised = encode_record(value, tokenizer) if chat is None else chat
    # Truncation takes end tokens away on purpose, so rows are looked at before it.
    ending = any(on and token in ends for token, on in zip(reversed(ids), reversed(supervised)))
    limit = encoding.max_length
    cut = limit is not None and len(ids) > limit
    if cut:
        if encoding.on_long_row != "truncate":
            raise RowError("too_long", f"{len(ids)} tokens, the limit is {limit}")
        ids, supervised = ids[:limit], supervised[:limit]
    row = make_row(ids, supervised, 0, encoding.shape, weights.weight_of(value))
    counts["without_end"] += not ending
    if cut:
        counts["truncated"] += 1
        counts["ends_lost"] += ending and not (supervised[-1] and ids[-1] in ends)
    return row
