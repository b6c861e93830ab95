"""A tiny random model, its words and its rows: what trainings of the harness are made of.

Imports transformers when called, and nothing of what is judged, so that any trainer can be given
the same.
"""

from __future__ import annotations

import json
import pathlib

import torch
from torch import nn

from verify.subject import TrainCase

VOCABULARY = 61
END, UNKNOWN = 0, 1


def tiny_llama(case: TrainCase) -> nn.Module:
    """A Llama of two layers in fp32, drawn from the case's seed; torch's own generator is left
    alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = LlamaForCausalLM(config)
        # Wider than transformers' 0.02, so that attention and gates are far from linear.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def token_rows(case: TrainCase, step: int) -> list[list[int]]:
    """The token ids of one global batch, without END and UNKNOWN."""
    draw = torch.Generator().manual_seed(case.seed + 1009 * step)
    return [torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in case.lengths]


def supervised(case: TrainCase, index: int) -> int:
    """Tokens of sequence ``index`` whose loss counts: all but the prompt, or the first token where there is none; the
    end token is one of them; none of a masked sequence."""
    return 0 if index in case.masked else case.lengths[index] + 1 - max(case.prompt, 1)


def supervised_tokens(case: TrainCase) -> int:
    """Those of one global batch, counted here."""
    return sum(supervised(case, index) for index in range(len(case.lengths)))


def write_rows(path: pathlib.Path, case: TrainCase, order: tuple[int, ...]) -> None:
    """All global batches as JSONL of prompt and completion, each batch's rows in ``order``."""
    lines = []
    for step in range(case.steps):
        rows = token_rows(case, step)
        for index in order:
            words = [f"w{i}" for i in rows[index]]
            prompt, completion = words[: case.prompt], words[case.prompt :]
            lines.append(
                json.dumps({"prompt": " ".join(prompt), "completion": " " + " ".join(completion)})
            )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokenizer(vocabulary: int = VOCABULARY):
    """One word, one token: ``w7`` is 7; with an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": END, "<unk>": UNKNOWN} | {f"w{i}": i for i in range(2, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
