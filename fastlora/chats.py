"""Many chats to ids and masks in a few calls, with the results of ``template.encode_messages`` for each.

What a chat costs beyond its tokens is paid here once for many: templates are rendered, texts tokenized and spans decoded in
batches, and the prefixes of a chat are not tokenized again. A tokenizer cuts a text at its added tokens before anything else
(``tokenizers``, AddedVocabulary.extract_and_normalize) and treats each piece by itself, so the ids of a prefix are those of the
whole chat up to the last such token that begins in it, then those of the short rest, which is tokenized and compared.

Only chats that can be trained on come out of here, each after the checks that template.py makes. For any other, and where a
tokenizer is not one whose calls are known to be what is done here, the answer is None: encode it alone, which says why.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from fastlora import template
from fastlora.encode import RowError, is_utf8

# Characters of all prefixes that are rendered at once: about a task of 2 MiB of chats of four turns of the assistant.
BATCH_CHARACTERS = 1 << 24
# A chat with more in its prefixes is encoded alone, where one prefix is held at a time.
MOST_CHARACTERS = 1 << 26

Chat = tuple[Sequence[dict], list | None]
# int32 ids and bool supervised, both [n].
Encoded = tuple[np.ndarray, np.ndarray]


def encode_chats(tokenizer, chats: Iterable[Chat]) -> list[Encoded | None]:
    """(ids, supervised) of each chat, given as (messages, tools), or None for one that has to be encoded alone.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    chats = list(chats)
    if not chats or not _known(tokenizer):
        return [None] * len(chats)
    marked = template.has_generation_marks(tokenizer)
    # A call that adds nothing and cuts nothing leaves the backend set to do the same.
    tokenizer("", add_special_tokens=False, verbose=False)
    one = _ByMarks(tokenizer) if marked else _ByPrefixes(tokenizer)
    found: list[Encoded | None] = [None] * len(chats)
    for places in _batches(chats):
        encoded = one.encode([chats[place] for place in places])
        for place, ids, supervised in zip(places, *encoded):
            if supervised is not None and _is_said(tokenizer, chats[place][0], ids, supervised):
                found[place] = np.asarray(ids, np.int32), supervised
    return found


def _known(tokenizer) -> bool:
    """Whether this is a fast tokenizer none of whose methods that are gone round here is its own."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.split_special_tokens
        and all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name, None) for name in ("_encode_plus", "_decode"))
        and all(getattr(kind, name) is getattr(PreTrainedTokenizerBase, name)
                for name in ("__call__", "decode", "apply_chat_template", "get_chat_template"))
    )  # fmt: skip


def _batches(chats: list[Chat]) -> Iterator[list[int]]:
    """Places of the chats that are chats and have something to learn from, some at a time."""
    places, size = [], 0
    for place, (messages, _) in enumerate(chats):
        try:
            template.check_messages(messages)
        except RowError:
            continue
        # A template is never given an empty chat, so a first turn of the assistant has no prefix.
        turns = len(template.turns_of(messages))
        prefixes = 2 * turns * sum(len(message.get("content") or "") for message in messages)
        if not turns or messages[0]["role"] == "assistant" or prefixes > MOST_CHARACTERS:
            continue
        places.append(place)
        size += prefixes
        if size >= BATCH_CHARACTERS:
            yield places
            places, size = [], 0
    if places:
        yield places


def _is_said(tokenizer, messages: Sequence[dict], ids: list[int], supervised: np.ndarray) -> bool:
    """Decode what is supervised: whether it is what the assistant said."""
    texts = [ids[start:stop] for start, stop in template.spans(supervised)]
    said = tokenizer.backend_tokenizer.decode_batch(texts, skip_special_tokens=False)
    return bool(said) and not template.first_unsaid(messages, said)


class _ByMarks:
    """Chats by a template with ``{% generation %}`` marks: as transformers does, but for a search where it walks all tokens."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.special = tokenizer, tokenizer.special_tokens_map

    def encode(self, chats: list[Chat]) -> tuple[list[list[int]], list[np.ndarray | None]]:
        """(ids, supervised) of each, supervised None where it has to be encoded alone."""
        plain = [_no_null(messages) for messages, _ in chats]
        done = iter(_render(self._render, [chat for chat, good in zip(chats, plain) if good]))
        rendered = [next(done) if good else None for good in plain]
        texts = [one[0] if one and is_utf8(one[0]) else "" for one in rendered]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [one.ids for one in encodings], [
            _inside(encoding, one[1]) if text else None for text, one, encoding in zip(texts, rendered, encodings)
        ]

    def _render(self, chats: list[list[dict]], tools: list | None) -> list[tuple[str, list[tuple[int, int]]]]:
        chosen = self.tokenizer.get_chat_template(tools=tools)
        return list(zip(*render_jinja_template(
            conversations=chats, tools=tools, chat_template=chosen, return_assistant_tokens_mask=True, **self.special
        )))  # fmt: skip


def _inside(encoding, spans: list[tuple[int, int]]) -> np.ndarray | None:
    """bool [n]: tokens that hold a character of a span; None where the spans are not one after the other."""
    edges = [edge for span in spans for edge in span]
    if edges != sorted(edges):
        return None
    inside = np.zeros(len(encoding), bool)
    places = range(len(encoding))
    for start, stop in spans:
        first = bisect.bisect_right(places, start, key=lambda token: encoding.token_to_chars(token)[1])
        inside[first : bisect.bisect_left(places, stop, key=lambda token: encoding.token_to_chars(token)[0])] = True
    return inside


class _ByPrefixes:
    """Chats by any other template: each turn is what lies between two prefixes of the chat."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        # At these a text is cut wherever they stand: what is before has no say, and what is behind may only be taken into them.
        self.cuts = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()
                     if not (added.normalized or added.lstrip or added.single_word)}  # fmt: skip
        self.is_cut = np.zeros(max(self.cuts, default=0) + 2, bool)  # the last stands for all larger ids
        self.is_cut[list(self.cuts)] = True
        self.special = tokenizer.special_tokens_map
        self.decode = functools.cache(lambda token, **options: tokenizer.decode([token], **options))
        self.known: dict[str, list[int]] = {}

    def encode(self, chats: list[Chat]) -> tuple[list[list[int]], list[np.ndarray | None]]:
        """(ids, supervised) of each, supervised None where it has to be encoded alone."""
        turns = [template.turns_of(messages) for messages, _ in chats]
        wholes = _render(self._render, chats)
        befores = self._prefixes(chats, turns, before=True)
        throughs = self._prefixes(chats, turns, before=False)
        good = [
            all(text is not None and is_utf8(text) for text in (whole, *before, *through))
            for whole, before, through in zip(wholes, befores, throughs)
        ]
        ids = self._tokenize([whole if ok else "" for whole, ok in zip(wholes, good)])
        # Each prefix as (tokens of the whole chat it begins with, text of the rest).
        cut = [
            [self._cut(whole, places, text) for text in (*before, *through)] if ok else []
            for whole, places, before, through, ok in zip(
                wholes, map(self._places, ids, wholes, good), befores, throughs, good)
        ]  # fmt: skip
        self._learn(rest for one in cut for _, rest in one)
        return ids, [
            self._supervised(all_ids, one, len(before)) if ok else None
            for all_ids, one, before, ok in zip(ids, cut, befores, good)
        ]

    def _render(self, chats: list[list[dict]], tools: list | None, **options) -> list[str]:
        if not all(map(_no_null, chats)):
            return self.tokenizer.apply_chat_template(chats, tools=tools, tokenize=False, **options)
        chosen = self.tokenizer.get_chat_template(tools=tools)
        return render_jinja_template(conversations=chats, tools=tools, chat_template=chosen, **options, **self.special)[0]

    def _prefixes(self, chats: list[Chat], turns: list[list[int]], before: bool) -> list[list[str | None]]:
        """The texts up to each turn, where generation would begin, or through each but one that ends the chat."""
        parts = [
            [(messages[: turn + (not before)], tools) for turn in each if before or turn + 1 < len(messages)]
            for (messages, tools), each in zip(chats, turns)
        ]
        render = functools.partial(self._render, add_generation_prompt=True) if before else self._render
        texts = iter(_render(render, [part for each in parts for part in each]))
        return [[next(texts) for _ in each] for each in parts]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _places(self, ids: list[int], text: str | None, good: bool) -> list[tuple[int, int, int]]:
        """(end of its characters, their start, token) of each cut in a text; none if text and ids do not tell the same."""
        if not good:
            return []
        values = np.asarray(ids, np.int64)
        tokens = np.flatnonzero(self.is_cut[np.minimum(values, len(self.is_cut) - 1)]).tolist()
        contents = [self.cuts[ids[token]] for token in tokens]
        matches = list(_any_of(frozenset(contents)).finditer(text)) if contents else []
        if [match[0] for match in matches] != contents:
            return []
        return [(match.end(), match.start(), token) for match, token in zip(matches, tokens)]

    def _cut(self, whole: str, places: list[tuple[int, int, int]], text: str) -> tuple[int, str]:
        if whole.startswith(text):
            last = bisect.bisect_right(places, len(text), key=lambda place: place[0]) - 1
            if last >= 0:
                _, start, token = places[last]
                return token, text[start:]
        return 0, text

    def _learn(self, texts: Iterable[str]) -> None:
        """Tokenize texts that are new; only short ones, which come again and again, are kept for the next batch."""
        self.known = {text: ids for text, ids in self.known.items() if len(text) < 64} if len(self.known) < 4096 else {}
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= zip(new, self._tokenize(new))

    def _supervised(self, ids: list[int], cut: list[tuple[int, str]], turns: int) -> np.ndarray | None:
        """bool [n], or None if prefixes disagree; ``cut`` holds the prefixes up to the turns, then those through them."""
        ends = []
        for token, rest in cut:
            end = token + len(self.known[rest])
            if ids[token:end] != self.known[rest]:
                return None
            ends.append(end)
        befores, throughs = ends[:turns], ends[turns:]
        if len(throughs) < turns:
            throughs.append(len(ids))
        supervised = np.zeros(len(ids), bool)
        for before, through in zip(befores, throughs, strict=True):
            if through <= before:
                return None
            supervised[before : template.turn_end(self.decode, ids, before, through)] = True
        return supervised


def _render(render, chats: list[Chat]) -> list:
    """``render(list of messages, tools)`` of every chat, those without tools in one call; None where the template refuses."""
    plain = [list(messages) for messages, tools in chats if not tools]
    try:
        done = iter(render(plain, None) if plain else [])
    except template.REFUSALS:
        done = None
    return [next(done) if done is not None and not tools else _alone(render, chat) for chat in chats for tools in chat[1:]]


def _alone(render, chat: Chat):
    try:
        return render([list(chat[0])], chat[1])[0]
    except template.REFUSALS:
        return None


def _no_null(messages: Sequence[dict]) -> bool:
    """Whether no field is null: versions of transformers differ in what a template sees of those."""
    return not any(value is None for message in messages for value in message.values())


@functools.lru_cache(64)
def _any_of(contents: frozenset[str]) -> re.Pattern:
    """The longest of some strings at the leftmost place, as ``tokenizers`` finds added tokens."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))
