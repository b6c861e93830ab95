"""A byte-level BPE tokenizer of 320 tokens, trained in place: nothing to download."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|start|>", "<|end|>", "<|turn|>", "<|stop|>"]

# One turn a line, closed by a token of its own, as Llama 3 and ChatML do.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|stop|>"
    "{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|stop|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Writes an assistant turn in another way when it is not the last one: no prefix of the whole chat.
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('#')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@functools.cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["user assistant system the answer is one two three hello world"] * 4, trainer
    )
    return tokenizer


def make_tokenizer(
    template: str | None = None, bos: bool = True, eos: bool = True
) -> PreTrainedTokenizerFast:
    """The tokenizer, with a chat template or none, with or without begin and end tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained().to_str()),
        bos_token=SPECIAL[0] if bos else None,
        eos_token=SPECIAL[1] if eos else None,
    )
    tokenizer.chat_template = template
    return tokenizer
