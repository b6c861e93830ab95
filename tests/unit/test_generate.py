"""Generation against transformers' own greedy search; stops, sampling, streaming, refusals."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora import encode, rundir, template
from fastlora.errors import InputError, TrainingError
from fastlora.generate import converse, generate, lines, prompt_tokens, stored_format
from tests.unit.tiny_tokenizer import PLAIN_TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(PLAIN_TEMPLATE)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Weights large enough that logits differ clearly and a random model does not repeat itself.
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class Scripted(torch.nn.Module):
    """Says the given tokens one after the other, whatever it reads."""

    def __init__(self, tokens, size, filler=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace()
        self.tokens, self.size, self.filler, self.reads = list(tokens), size, filler, []

    def forward(self, input_ids, use_cache, logits_to_keep, cache):
        # The cache of the last call comes back, or there is none yet.
        assert cache == (len(self.reads) or None)
        self.reads.append(input_ids[0].tolist())
        logits = torch.full((1, 1, self.size), self.filler)
        logits[0, 0, self.tokens[len(self.reads) - 1]] = 100.0
        return types.SimpleNamespace(logits=logits, cache=len(self.reads))


def test_generate_greedy_is_transformers_greedy(model, tokenizer):
    for prompt in ("one two", "hello world", "the answer"):
        ids = encode.prompt_ids(tokenizer, prompt)
        given = torch.tensor([ids])
        # With a mask given, transformers does not take the begin token (id 0) for padding.
        theirs = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :]
        ours = generate(model, tokenizer, prompt, max_new_tokens=20)
        assert ours == tokenizer.decode(theirs, skip_special_tokens=True)
        assert ours


def test_generate_stops_at_the_end_token_and_streams_whole_characters(tokenizer):
    said = tokenizer("naïve — 世界", add_special_tokens=False)["input_ids"]
    network = Scripted([*said, tokenizer.eos_token_id, *said], len(tokenizer))
    pieces: list[str] = []
    text = generate(network, tokenizer, "one", stream=pieces.append)
    assert text == "naïve — 世界" == "".join(pieces)
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    # The prompt is read once; afterwards each token alone, through the cache.
    assert network.reads == [encode.prompt_ids(tokenizer, "one"), *([token] for token in said)]


def test_generate_streams_what_ends_in_half_a_character(tokenizer):
    said = tokenizer("a世", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    network = Scripted(said, len(tokenizer))
    text = generate(network, tokenizer, "one", max_new_tokens=len(said) - 1, stream=pieces.append)
    assert text == "".join(pieces)
    assert text.startswith("a\ufffd")


def test_generate_stops_where_the_chat_template_ends_a_turn(tokenizer):
    said = tokenizer("two", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    network = Scripted([*said, stop], len(tokenizer))
    messages = [{"role": "user", "content": "one"}]
    assert generate(network, tokenizer, messages) == "two"
    assert network.reads[0] == template.generation_ids(tokenizer, messages)
    # Text under the format of chats is one turn of the user.
    assert prompt_tokens(tokenizer, "one", "messages")[0] == network.reads[0]
    # As plain text the same token does not end the answer.
    network = Scripted([*said, stop, tokenizer.eos_token_id], len(tokenizer))
    assert generate(network, tokenizer, "one") == "two"
    assert len(network.reads) == len(said) + 2


def test_converse_gives_each_turn_all_that_was_said(model, tokenizer):
    asked, pieces, seen = [], [], []
    model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"][0].tolist()), with_kwargs=True)
    turns = lines(["one\n", "  \n", "is\n"], lambda: asked.append(len(pieces)))
    model.generation_config.eos_token_id = None
    answers = list(converse(model, tokenizer, turns, format="messages", max_new_tokens=2, stream=pieces.append))
    assert len(answers) == 2 and all(answer.strip() for answer in answers) and "".join(pieces) == "".join(answers)
    said = [{"role": "user", "content": "one"}]
    assert seen[0] == template.generation_ids(tokenizer, said)
    said += [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": "is"}]
    assert template.generation_ids(tokenizer, said) in seen[1:]
    # asked before the first line and after each, the empty one too; an answer stands before the next is asked for
    assert len(asked) == 4 and asked[0] == 0 and asked[1] == asked[2] > 0


def test_generate_sampling_is_repeatable_and_follows_the_seed(model, tokenizer):
    def sample(seed, temperature=2.0):
        return generate(
            model, tokenizer, "one", max_new_tokens=12, temperature=temperature, seed=seed
        )

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    # So cold that the most likely token alone is left.
    assert sample(1, temperature=1e-6) == generate(model, tokenizer, "one", max_new_tokens=12)


def test_generate_makes_no_more_than_the_model_has_positions_for(model, tokenizer):
    model.generation_config.eos_token_id = None
    tokenizer = make_tokenizer(eos=False)
    reads = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, tokenizer, "one two", max_new_tokens=1000)
    # The last token made is never read.
    assert sum(reads) == 64 - 1
    with pytest.raises(InputError, match=r"prompt has \d+ tokens; the model has 64 positions"):
        generate(model, tokenizer, "one " * 64)


def test_generate_puts_every_module_back_into_its_mode(model, tokenizer):
    model.train()
    model.lm_head.eval()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    generate(model, tokenizer, "one", max_new_tokens=2)
    assert not any(seen)
    assert model.training
    assert not model.lm_head.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generate_names_logits_that_are_not_finite(model, tokenizer):
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        generate(model, tokenizer, "one")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("one", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("one", {"temperature": -1.0}, "temperature is -1.0"),
        ("one", {"temperature": float("nan")}, "temperature is nan"),
        ("one", {"format": "chat"}, "format is 'chat'; allowed are messages"),
        ([{"role": "user", "content": "a"}], {"format": "text"}, "list of messages"),
        ([], {}, "at least one message"),
    ],
)
def test_generate_refuses_bad_arguments(model, tokenizer, prompt, options, message):
    with pytest.raises(InputError, match=message):
        generate(model, tokenizer, prompt, **options)


def test_generate_refuses_a_prompt_of_no_token(model):
    with pytest.raises(InputError, match="prompt is empty"):
        generate(model, make_tokenizer(bos=False), "")


def test_stored_format_reads_the_file_beside_the_adapter(tmp_path):
    assert stored_format(tmp_path) is None
    rundir.write_run(tmp_path, {"data": {"format": "messages"}})
    assert stored_format(tmp_path) == "messages"
    rundir.write_run(tmp_path, {"data": {"format": "other"}})
    with pytest.raises(InputError, match="format is 'other'"):
        stored_format(tmp_path)
