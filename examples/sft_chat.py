"""Supervised fine-tuning on a file of chats, by commands: look at the data, train, ask, merge.

Run it anywhere: ``python examples/sft_chat.py [FOLDER]``. FOLDER gets the files (default: a temporary one). The model is a tiny
random one, so its answers are noise; put the folder of your own in the place of ``MODEL``, and your own rows into ``chats.jsonl``.
"""

# ruff: noqa: T201  (a script that shows its result)

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile

from small_chat import CHATS, save_model

from fastlora import cli


def fastlora(*words: object) -> None:
    """One command, as you would type it; run in this process, which spares it starting Python again."""
    print("$ fastlora", *words, flush=True)
    try:
        cli.main([str(word) for word in words])
    except SystemExit as left:
        if left.code:
            raise


def main(folder: pathlib.Path) -> None:
    """Every step from the file of chats to a merged model."""
    os.chdir(folder)
    save_model(pathlib.Path("MODEL"))
    pathlib.Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    fastlora("data", "chats.jsonl", "--model", "MODEL")
    fastlora("train", "--model", "MODEL", "--data", "chats.jsonl", "--output", "run", "--epochs", 2, "--batch-size", 8,
             "--learning-rate", 1e-2)
    fastlora("generate", "--model", "MODEL", "--adapter", "run", "--prompt", "What comes after 3?", "--max-new-tokens", 12)
    fastlora("merge", "--model", "MODEL", "--adapter", "run", "--output", "merged")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(pathlib.Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(pathlib.Path(place))
