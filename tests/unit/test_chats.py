"""Chats encoded together have the ids and masks that each has alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastlora import chats, template
from fastlora.encode import RowError
from tests.unit.tiny_tokenizer import FORGETFUL_TEMPLATE, MARKED_TEMPLATE, PLAIN_TEMPLATE, make_tokenizer

LLAMA_3 = (
    "{{ bos_token }}{% if tools %}{{ tools | length }}{% endif %}{% for m in messages %}<|turn|>{{ m['role'] }}<|end|>\n"
    "{{ m['content'] | trim }}<|stop|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant<|end|>\n{% endif %}"
)
TEMPLATES = {
    "chatml": PLAIN_TEMPLATE,
    "marked": MARKED_TEMPLATE,
    "forgetful": FORGETFUL_TEMPLATE,
    "llama 3": LLAMA_3,
    "trims": PLAIN_TEMPLATE.replace("m['content']", "m['content'] | trim"),
    "no special tokens": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                         "{% if add_generation_prompt %}[assistant] {% endif %}",
    "marks glued to words": "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}{% generation %}"
                            "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "refuses a word": "{% if 'two' in messages[-1]['content'] %}{{ raise_exception('two') }}{% endif %}" + PLAIN_TEMPLATE,
}  # fmt: skip

WORDS = ["one", "two ", " three", "because#", "\n", "  ", "é", "e\u0301", "😀", "世界", "<|stop|>", "<|turn|>", "<|tu", "▁", "ﬁ", "\ud800"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "assistant", "system"]), "content": TEXT},
                                optional={"name": st.sampled_from([None, "x", "\ud800"])})
CHAT = st.lists(MESSAGE, max_size=6)
ROUNDS = st.lists(TEXT, min_size=2, max_size=6).map(
    lambda texts: [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)])
ROWS = st.lists(st.tuples(st.one_of(CHAT, ROUNDS, ROUNDS), st.sampled_from([None, None, [{"name": "f"}]])), max_size=6)


def with_prefix_space(scheme: str, **flags: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as of Llama 2: a space before a text's first word or every piece's, bytes where a word is unknown."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "▁t", "▁o", "on", "▁on"]
    vocab = {piece: place for place, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    model = models.BPE(vocab, [("▁", "t"), ("▁", "o"), ("o", "n"), ("▁o", "n"), ("▁", "on")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True, **flags) for name in
                                ("<|start|>", "<|end|>", "<|turn|>", "<|stop|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>")


TOKENIZERS = {
    "byte level": make_tokenizer,
    "space at the first": lambda: with_prefix_space("first"),
    "space at every piece": lambda: with_prefix_space("always", rstrip=True),
    "tokens that take space before": lambda: with_prefix_space("first", lstrip=True),
    "tokens that are words": lambda: with_prefix_space("first", single_word=True),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_encode_chats_gives_what_each_chat_alone_gives(kind, name):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = TEMPLATES[name]

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(ROWS)
    def check(rows):
        for (messages, tools), found in zip(rows, chats.encode_chats(tokenizer, rows), strict=True):
            try:
                expected = template.encode_messages(tokenizer, messages, tools)
            except (RowError, TypeError):
                # TypeError: what a tokenizer says of half of a surrogate pair.
                assert found is None
                continue
            if found is not None:
                assert (found[0].tolist(), found[1].tolist()) == expected

    check()


@pytest.mark.parametrize("name", ["chatml", "marked", "llama 3", "trims"])
def test_encode_chats_leaves_no_usual_chat_to_be_encoded_alone(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    messages = [{"role": role, "content": "the answer"} for role in ("system", *("user", "assistant") * 3)]
    rows = [(messages, None), (messages[:3], [{"name": "f"}]), (messages[:4], None)]
    assert all(found is not None for found in chats.encode_chats(tokenizer, rows))
    assert chats.encode_chats(tokenizer, []) == []


def test_encode_chats_does_not_tokenize_prefixes_again(monkeypatch):
    tokenizer, seen = make_tokenizer(PLAIN_TEMPLATE), []
    tokenize = chats._ByPrefixes._tokenize
    monkeypatch.setattr(chats._ByPrefixes, "_tokenize", lambda self, texts: seen.extend(texts) or tokenize(self, texts))
    rows = [([{"role": role, "content": f"hello {row}"} for role in ("user", "assistant") * 5], None) for row in range(20)]
    assert all(found is not None for found in chats.encode_chats(tokenizer, rows))
    assert sorted(seen[20:]) == ["<|stop|>\n", "<|turn|>assistant\n"]


def test_encode_chats_leaves_a_tokenizer_with_ways_of_its_own_alone():
    class Own(PreTrainedTokenizerFast):
        def decode(self, *args, **options):
            return super().decode(*args, **options)

    tokenizer = Own(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="<|end|>", chat_template=PLAIN_TEMPLATE)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert chats.encode_chats(tokenizer, [(messages, None)]) == [None]


def test_encode_chats_holds_few_prefixes_at_once(monkeypatch):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    rows = [([{"role": role, "content": "one two"} for role in ("user", "assistant") * turns], None) for turns in (1, 1, 2, 20, 1)]
    whole = chats.encode_chats(tokenizer, rows)
    monkeypatch.setattr(chats, "BATCH_CHARACTERS", 60)
    monkeypatch.setattr(chats, "MOST_CHARACTERS", 1000)
    assert list(chats._batches(rows)) == [[0, 1, 2], [4]]
    parts = chats.encode_chats(tokenizer, rows)
    assert parts[3] is None
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(whole, parts) if b is not None)
