"""Seconds to make training rows of a data file, beside the seconds its tokenizer needs for the same texts.

``python -m bench.tokens`` draws chats (or plain texts, or pairs) from the sources of Python's standard library and tokenizes
them with SmolLM2's tokenizer, that of the demo, twice: ``encode_task`` from the file's bytes to arrays, and the fast tokenizer
alone: one batch call on the strings that hold each row whole, already read and rendered. Beside it stands what the tokenizer takes for
what the shape asks of it: a chat is rendered too, and a prompt is tokenized by itself besides (its ids are those of generation). All run in
this process on one thread, as a worker does, in turn over the same pieces of 2 MiB; ratios of the minima of each piece are printed.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import statistics
import sysconfig
import tempfile
import time
from typing import Annotated

import typer

from fastlora.encode import check_text
from fastlora.sources import Task, parse, records, tasks
from fastlora.tokenizing import Encoding, encode_task

# The demo's template (ChatML) as it stands, and others for the same tokens.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": None, "marked": MARKED, "trimmed": TRIMMED}


def paragraphs() -> list[str]:
    """Pieces of the standard library's sources, split where they leave a line empty; in a fixed order."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = [part for path in sorted(folder.glob("*.py")) for part in path.read_text(errors="replace").split("\n\n")]
    # A chat that begins a turn with a line end is refused where the template ends its own line before: one token for both.
    return [part.strip() for part in found if part.strip()]


def drawn(shape: str, turns: int, size: int) -> list[str]:
    """Lines of JSON of about ``size`` bytes in all; a chat has one to ``2 * turns - 1`` turns of the assistant."""
    draw, texts, lines, total = random.Random(0), paragraphs(), [], 0
    while total < size:
        if shape == "messages":
            roles = ("user", "assistant") * draw.randint(1, 2 * turns - 1)
            record = {"messages": [{"role": role, "content": "\n\n".join(draw.choices(texts, k=1 + 2 * (role == "assistant")))}
                                   for role in roles]}
        elif shape == "text":
            record = {"text": "\n\n".join(draw.choices(texts, k=8))}
        else:
            record = {"prompt": draw.choice(texts), "completion": "\n\n".join(draw.choices(texts, k=3))}
        lines.append(json.dumps(record, ensure_ascii=False))
        total += len(lines[-1].encode()) + 1
    return lines


def whole(record: dict, tokenizer) -> str:
    """The string that holds a row whole."""
    if "messages" in record:
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    return check_text(record["text"] if "text" in record else record["prompt"] + record["completion"], "text")


OPTIONS = dict(add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False)


def asked(parsed: list[dict], texts: list[str], tokenizer) -> None:
    """The tokenizer's own calls for these rows; ``texts`` are their whole strings."""
    if "messages" in parsed[0]:
        tokenizer.apply_chat_template([record["messages"] for record in parsed], tokenize=True)
        return
    tokenizer(texts, **OPTIONS)
    if "prompt" in parsed[0]:
        tokenizer([record["prompt"] for record in parsed], **OPTIONS)


def timed(call) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def piece_times(task: Task, encoding: Encoding, repeats: int) -> tuple[float, float, float, int]:
    """(least seconds of one call on the whole strings, of the calls of :func:`asked`, of ``encode_task``; tokens)."""
    tokenizer, parsed = encoding.tokenizer, [parse(raw) for _, _, raw in records(task)]
    texts = [whole(record, tokenizer) for record in parsed]
    piece = encode_task(task, encoding)
    assert not piece.problems, piece.problems[0]
    calls = (lambda: tokenizer(texts, **OPTIONS)), (lambda: asked(parsed, texts, tokenizer)), (lambda: encode_task(task, encoding))
    # in turn, so that a machine that slows down slows all of them
    taken = [[timed(call) for call in calls] for _ in range(repeats)]
    return *(min(times) for times in zip(*taken)), len(piece.ids)


def measure(shape: str, template: str, turns: int, size: int, repeats: int) -> tuple[list[float], list[float], float, int]:
    """(of each piece: ratio over one call on whole strings, ratio over the calls of :func:`asked`; MB a second of ``encode_task``; tokens)."""
    from transformers import AutoTokenizer

    from fastlora.demo_model import GGUF_FILE, fetch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(fetch(say=lambda text: None), gguf_file=GGUF_FILE)
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    encoding = Encoding(tokenizer, shape, None, "refuse")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        path.write_text("\n".join(drawn(shape, turns, size)) + "\n", encoding="utf-8")
        alone, own, rows, tokens = zip(*(piece_times(task, encoding, repeats) for task in tasks([path])))
    over_whole, over_asked = ([r / t for r, t in zip(rows, times)] for times in (alone, own))
    return over_whole, over_asked, size / 1e6 / sum(rows), sum(tokens)


def main(
    shape: Annotated[str, typer.Option(help="messages, text or prompt-completion.")] = "messages",
    template: Annotated[str, typer.Option(help="Of chats: chatml (the demo's), marked or trimmed.")] = "chatml",
    turns: Annotated[int, typer.Option(help="Turns of the assistant in a chat, on average.")] = 2,
    megabytes: Annotated[float, typer.Option(help="Size of the file.")] = 6.0,
    repeats: Annotated[int, typer.Option(help="Times each piece is encoded either way.")] = 5,
) -> None:
    """Measure one shape and print one line."""
    over_whole, over_asked, rate, tokens = measure(shape, template, turns, int(megabytes * 1e6), repeats)
    name = f"{shape} {template} turns {turns}" if shape == "messages" else shape
    print(f"{name}: {statistics.median(over_whole):.2f}x the tokenizer's time for whole strings (pieces {min(over_whole):.2f} to "
          f"{max(over_whole):.2f}), {statistics.median(over_asked):.2f}x its own calls, {rate:.1f} MB/s on one core, {tokens} tokens")


if __name__ == "__main__":
    typer.run(main)
