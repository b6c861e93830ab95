"""``python -m bench.advice_page``: writes docs/advise/rules.js, the rules and a few models' sizes for the page that needs no server.

A page opened from a file may load scripts and nothing else, so the table (fastlora/advice_rules.json) is wrapped into one.
"""

from __future__ import annotations

import json
import pathlib

from bench.memory import shape_facts
from bench.shapes import SHAPES
from fastlora import advise
from fastlora.files import atomic_write_text

PATH = pathlib.Path(__file__).parents[1] / "docs" / "advise" / "rules.js"
MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b")


def text() -> str:
    """What docs/advise/rules.js holds."""
    held = {"rules": advise.rules(), "models": {name: shape_facts(SHAPES[name]).as_dict() for name in MODELS}}
    return ("// Made by python -m bench.advice_page from fastlora/advice_rules.json; change that file, not this one.\n"
            f"globalThis.fastloraRules = {json.dumps(held, indent=1)};\n")


if __name__ == "__main__":
    atomic_write_text(PATH, text())
    print(f"written: {PATH.name}")
