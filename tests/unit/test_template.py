"""Chats to ids and masks: by generation marks, by prefixes, and what is refused."""

from __future__ import annotations

import pytest

from fastlora import template
from fastlora.encode import RowError
from fastlora.errors import InputError
from tests.unit.tiny_tokenizer import (
    FORGETFUL_TEMPLATE,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    make_tokenizer,
)


def chat(*turns: str) -> list[dict]:
    """Turns in alternation, the user first."""
    return [
        {"role": ("user", "assistant")[place % 2], "content": turn}
        for place, turn in enumerate(turns)
    ]


def said(tokenizer, messages) -> str:
    """What is supervised, decoded."""
    ids, supervised = template.encode_messages(tokenizer, messages)
    assert len(ids) == len(supervised)
    return tokenizer.decode([token for token, on in zip(ids, supervised) if on])


@pytest.mark.parametrize("text", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_encode_messages_supervises_assistant_turns_alone(text):
    tokenizer = make_tokenizer(text)
    assert said(tokenizer, chat("one", "two")) == "two<|stop|>"
    assert said(tokenizer, chat("one", "two", "three", "héllo\nworld ")) == (
        "two<|stop|>héllo\nworld <|stop|>"
    )
    # A last turn of the user is context that nothing follows.
    assert said(tokenizer, chat("one", "two", "three")) == "two<|stop|>"
    system = [{"role": "system", "content": "be short"}, *chat("one", "two")]
    assert said(tokenizer, system) == "two<|stop|>"


def test_encode_messages_gives_the_same_with_and_without_marks():
    messages = chat("one two", "three", "hello", "the answer is\n\nworld")
    plain = template.encode_messages(make_tokenizer(PLAIN_TEMPLATE), messages)
    marked = template.encode_messages(make_tokenizer(MARKED_TEMPLATE), messages)
    assert plain == marked
    assert template.has_generation_marks(make_tokenizer(MARKED_TEMPLATE))
    assert not template.has_generation_marks(make_tokenizer(PLAIN_TEMPLATE))


@pytest.mark.parametrize("text", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_generation_ids_are_the_prefix_seen_in_training(text):
    tokenizer = make_tokenizer(text)
    messages = chat("one", "two", "three", "hello")
    ids, supervised = template.encode_messages(tokenizer, messages)
    for turn in (1, 3):
        prompt = template.generation_ids(tokenizer, messages[:turn])
        assert ids[: len(prompt)] == prompt
        assert supervised[len(prompt)]
        assert not supervised[len(prompt) - 1]


def test_encode_messages_refuses_prefixes_that_disagree():
    tokenizer = make_tokenizer(FORGETFUL_TEMPLATE)
    assert said(tokenizer, chat("one", "because#two")) == "because#two<|stop|>"
    assert said(tokenizer, chat("one", "two", "three", "one")) == "two<|stop|>one<|stop|>"
    with pytest.raises(RowError, match=r"message 2 differently.*prefixes disagree") as caught:
        template.encode_messages(tokenizer, chat("one", "because#two", "three", "one"))
    assert caught.value.kind == "template"


def test_encode_messages_refuses_marks_that_miss_what_was_said():
    broken = MARKED_TEMPLATE.replace(
        "{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"
    )
    with pytest.raises(RowError, match="do not decode to what message 2"):
        template.encode_messages(make_tokenizer(broken), chat("one", "two"))
    empty = PLAIN_TEMPLATE + "{% generation %}{% endgeneration %}"
    with pytest.raises(RowError, match="marks hold no token") as caught:
        template.encode_messages(make_tokenizer(empty), chat("one", "two"))
    assert caught.value.kind == "no_supervised_token"


def test_encode_messages_keeps_white_space_that_ends_a_turn():
    # No end token: here the line end is all there is to stop at.
    tokenizer = make_tokenizer(PLAIN_TEMPLATE.replace("<|stop|>", ""))
    assert said(tokenizer, chat("one", "two")) == "two\n"


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ([], "bad_format", "at least one message"),
        ("hello", "bad_format", "must be a list"),
        (["hello"], "bad_format", "message 1 is a string"),
        ([{"content": "a"}], "bad_format", "role of message 1"),
        ([{"role": "user", "content": ["a"]}], "bad_format", "content of message 1.* is a list"),
        ([{"role": "user", "content": "a"}], "no_supervised_token", "no message of the assistant"),
        (chat("one", " "), "empty_completion", "message 2, of the assistant, is empty"),
        ([{"role": "assistant", "content": "a"}], "template", "message 1 is of the assistant.*put a message of the user before it"),
    ],
)
def test_encode_messages_refuses_what_is_no_chat(messages, kind, message):
    with pytest.raises(RowError, match=message) as caught:
        template.encode_messages(make_tokenizer(PLAIN_TEMPLATE), messages)
    assert caught.value.kind == kind


def test_encode_messages_passes_on_what_the_template_refuses():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="refuses the messages: roles must alternate") as caught:
        template.encode_messages(make_tokenizer(strict), chat("one", "two"))
    assert caught.value.kind == "template"


def test_chat_template_absent_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        template.encode_messages(make_tokenizer(), chat("one", "two"))


def test_stop_ids_hold_the_end_token_and_what_ends_a_turn():
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    names = {
        tokenizer.convert_ids_to_tokens(one) for one in template.stop_ids(tokenizer, "messages")
    }
    assert names == {"<|end|>", "<|stop|>"}
    assert template.stop_ids(tokenizer, "text") == {tokenizer.eos_token_id}
