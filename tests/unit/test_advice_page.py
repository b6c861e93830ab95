"""docs/advise: the JavaScript module and the page against fastlora.advise, in node and in headless Chromium."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
import random
import re
import shutil
import subprocess
import tomllib

import pytest

from bench import advice_page
from fastlora import advise
from fastlora.advice_memory import ModelFacts

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "advise"
CASES = 200
CONTROLS = 30
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def plain(value):
    """What JSON makes of it: tuples become lists."""
    return json.loads(json.dumps(value))


def drawn_model(draw: random.Random) -> ModelFacts:
    heads, per, size = draw.choice((4, 9, 32)), draw.choice((1, 3)), draw.choice((16, 64, 128))
    key_heads, hidden, inner = max(1, heads // per), draw.randrange(64, 8192, 8), draw.randrange(96, 30000, 8)
    qkv = ((heads + 2 * key_heads) * size,) if draw.random() < 0.2 else (heads * size, key_heads * size, key_heads * size)
    gate_up = (2 * inner,) if len(qkv) == 1 else (inner, inner)
    return ModelFacts(
        parameters=draw.randrange(10**6, 10**11), layers=draw.randrange(1, 90), hidden=hidden, vocabulary=draw.randrange(300, 260_000),
        positions=draw.choice((512, 2048, 131072)), heads=heads, key_heads=key_heads, head_dim=size, head_norms=draw.random() < 0.3,
        sandwich=draw.random() < 0.3, fused=draw.random() < 0.9,
        groups=((hidden, qkv), (heads * size, (hidden,)), (hidden, gate_up), (inner, (hidden,))),
    )


def drawn_data(draw: random.Random) -> dict | None:
    if draw.random() < 0.2:
        return None
    rows, longest = draw.randrange(1, 10 ** draw.randrange(1, 8)), draw.randrange(2, 40_000)
    lengths = sorted((draw.randrange(1, longest + 1) for _ in advise.rules()["quantiles"]), reverse=True)
    tokens = rows * draw.randrange(1, 3000)
    return {"rows": rows, "tokens": tokens, "padded": tokens + draw.randrange(10**6), "supervised": draw.randrange(1, tokens + 1),
            "squares": tokens * draw.randrange(1, 3000), "bytes_per_token": draw.choice((1.5, 2.0, 4.2)),
            "quantiles": dict(zip(advise.rules()["quantiles"], lengths))}


def drawn(count: int) -> list[dict]:
    draw = random.Random(20261125)
    return [
        {"goal": draw.choice(advise.GOALS), "model": drawn_model(draw), "data": drawn_data(draw), "new_vocabulary": draw.random() < 0.1,
         "card": draw.choice((None, draw.randrange(2, 200) * advise.GIB)), "rank": draw.choice((None, None, draw.randrange(1, 257)))}
        for _ in range(count)
    ]  # fmt: skip


def expected(case: dict) -> dict:
    return plain({"decide": advise.decide(case), "cards": advise.cards(case)})


def as_json(cases: list[dict]) -> str:
    return json.dumps([case | {"model": dataclasses.asdict(case["model"])} for case in cases])


def in_chromium(page: pathlib.Path) -> str:
    """The page's document once its scripts have run."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", f"--user-data-dir={page.parent}/profile",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def result_of(document: str):
    """The JSON in the element ``result``."""
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', document, re.DOTALL)[1]))


def assert_agree(found: list[dict], cases: list[dict]) -> None:
    assert len(found) == len(cases)
    for one, case in zip(found, cases):
        assert one == expected(case), case
    # the draw reaches what it is there to compare
    decisions = [one["decide"] for one in found]
    assert {d["fits"] for d in decisions} == {d["lora"]["use_rslora"] for d in decisions} == {True, False}
    assert {d["train"]["on_long_row"] for d in decisions} == {"skip", "refuse"}
    assert {v for d in decisions for v in d["verdicts"]} == set(advise.rules()["verdicts"])


def test_committed_rules_of_the_page_are_the_librarys():
    assert advice_page.PATH.read_text(encoding="utf-8") == advice_page.text()


@needs_node
def test_module_agrees_with_python_in_node(tmp_path):
    cases = drawn(CASES)
    (tmp_path / "cases.json").write_text(as_json(cases))
    (tmp_path / "run.mjs").write_text(
        f'import {{ readFileSync }} from "node:fs";\nimport {{ cards, decide, rules }} from {json.dumps((FOLDER / "advise.mjs").as_uri())};\n'
        f'const cases = JSON.parse(readFileSync({json.dumps(str(tmp_path / "cases.json"))}, "utf8"));\n'
        "console.log(JSON.stringify(cases.map((facts) => ({ decide: decide(facts, rules), cards: cards(facts, rules) }))));\n"
    )
    done = subprocess.run([NODE, str(tmp_path / "run.mjs")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_agree(json.loads(done.stdout), cases)


@needs_node
def test_configuration_object_is_read_as_pefts_own():
    from fastlora import LoraConfig

    script = (
        f'import {{ decide, loraConfig, models, rules, toToml }} from {json.dumps((FOLDER / "advise.mjs").as_uri())};\n'
        'const facts = { goal: "domain", model: models["llama-3.1-8b"], data: null, card: null, rank: null, new_vocabulary: false };\n'
        'console.log(JSON.stringify([loraConfig(facts, rules), toToml(decide(facts, rules), { data: "a\\"b" })]));\n'
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given, toml = json.loads(done.stdout)
    lora = LoraConfig.from_peft(given)
    assert (lora.r, lora.use_rslora, lora.lora_alpha) == (128, True, 16)
    read = tomllib.loads(toml)
    assert read["train"]["data"] == 'a"b' and LoraConfig(**read["lora"]).scaling_for("x") == lora.scaling_for("x")


@needs_chromium
def test_script_agrees_with_python_in_chromium(tmp_path):
    cases = drawn(CASES)
    (tmp_path / "test.html").write_text(
        '<!doctype html><meta charset="utf-8"><pre id="result"></pre>'
        + "".join(f'<script src="{(FOLDER / name).as_uri()}"></script>' for name in ("rules.js", "advise.js"))
        + f"<script>const {{ decide, cards }} = fastloraAdvise, rules = fastloraRules.rules, cases = {as_json(cases)};"
        "document.getElementById('result').textContent = JSON.stringify("
        "cases.map((facts) => ({ decide: decide(facts, rules), cards: cards(facts, rules) })));</script>"
    )
    assert_agree(result_of(in_chromium(tmp_path / "test.html")), cases)


@needs_chromium
def test_page_shows_what_python_decides_for_its_controls(tmp_path):
    draw = random.Random(7)
    table, models = advise.rules(), json.loads(advice_page.text().partition(" = ")[2].rstrip(";\n"))["models"]
    cases = [
        {"model": draw.choice(list(models)), "goal": draw.choice(advise.GOALS), "memory": draw.randrange(4, 193),
         "rank": draw.randrange(len(table["ranks"]) + 1), "rows": draw.choice((0, 50, 3000, 10**6)), "mean": draw.randrange(10, 1000),
         "longest": draw.randrange(1000, 6000)} for _ in range(CONTROLS)
    ]  # fmt: skip
    script = (
        f"const out = []; for (const c of {json.dumps(cases)}) {{"
        " for (const id of ['model', 'memory', 'rank', 'rows', 'mean', 'longest']) { const e = document.getElementById(id);"
        " e.value = c[id]; e.dispatchEvent(new Event('input')); }"
        " const press = (box, text) => [...document.getElementById(box).children].find((b) => b.textContent === text).click();"
        " press('goal', c.goal); const one = {};"
        " for (const f of ['PEFT JSON', 'run.toml']) { press('tabs', f); one[f] = document.getElementById('config').textContent; }"
        " one.verdict = document.getElementById('verdict').className; out.push(one); }"
        " const pre = document.createElement('pre'); pre.id = 'result'; pre.textContent = JSON.stringify(out); document.body.append(pre);"
    )
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert "http" not in text  # nothing from a server
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", f'<head><base href="{FOLDER.as_uri()}/">').replace("</body>", f"<script>{script}</script></body>"))
    for case, shown in zip(cases, result_of(in_chromium(page)), strict=True):
        rows, mean, longest = case["rows"], case["mean"], max(case["mean"], case["longest"])
        data = rows and {"rows": rows, "tokens": rows * mean, "padded": 0, "supervised": rows * mean, "squares": 0,
                         "quantiles": dict.fromkeys(table["quantiles"], longest), "bytes_per_token": table["least_bytes_per_token"]}
        found = advise.decide({
            "goal": case["goal"], "model": ModelFacts(**models[case["model"]]), "data": data or None, "card": case["memory"] * advise.GIB,
            "rank": ([None, *table["ranks"]])[case["rank"]], "new_vocabulary": False,
        })  # fmt: skip
        toml = tomllib.loads(shown["run.toml"])
        assert toml["lora"] == found["lora"], case
        assert {k: toml["train"][k] for k in found["train"]} == found["train"], case
        assert {k: json.loads(shown["PEFT JSON"])[k] for k in found["lora"]} == found["lora"], case
        assert ("bad" not in shown["verdict"]) == (found["fits"] and not found["verdicts"]), case
