"""kill -9 at random moments, then --resume: the files of a run that nobody killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from tiny_run import DEVICES, model_on, train, write_rows

# A few in every run of the tests; FASTLORA_KILLS=30 for as many as convince.
KILLS = int(os.environ.get("FASTLORA_KILLS", "3"))
CUTS = (192, 256, 4096)


def run_once(folder, name: str, cut: int, steps: int, device: str) -> None:
    """In a process of its own: begin the run, or go on with it."""
    train(folder, name, model=model_on(device), steps=steps, checkpoint_every=2, micro_batch_tokens=cut, lora={"lora_dropout": 0.1},
          resume=(folder / name / "run.toml").exists())


def lines(folder) -> list[bytes]:
    path = folder / "log.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor kill -9")
@pytest.mark.parametrize("device", DEVICES)
def test_train_killed_at_random_moments_and_resumed_gives_the_same_file(tmp_path, device):
    kills, steps = KILLS, 3 * KILLS
    write_rows(tmp_path / "rows.jsonl")
    # Children are forked from a process that has imported everything and has no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlora.train", "tiny_run", "transformers.models.llama.modeling_llama"])
    seed = random.randrange(2**32)
    draw = random.Random(seed)

    def start(name: str):
        process = context.Process(target=run_once, args=(tmp_path, name, draw.choice(CUTS), steps, device))
        process.start()
        return process

    whole = start("whole")
    killed = 0
    for number in range(kills):
        # Every third dies at any moment, before its first step perhaps; the others when a step or two are done.
        process, wanted = start("a"), 0 if number % 3 == 2 else draw.randrange(1, 3)
        before = len(lines(tmp_path / "a"))
        # What follows the last checkpoint is run again, so the log may first become shorter.
        deadline = time.monotonic() + 60
        while process.is_alive() and len(lines(tmp_path / "a")) < min(before + wanted, steps - 2):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() * (0.1 if wanted else 2.0))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    last = start("a")
    for process in (whole, last):
        process.join(120)
        assert process.exitcode == 0, seed
    assert killed >= kills - 1, seed
    md5 = {name: hashlib.md5((tmp_path / name / "adapter_model.safetensors").read_bytes()).hexdigest()
           for name in ("whole", "a")}
    assert md5["a"] == md5["whole"], seed
    logs = [[json.loads(line) for line in lines(tmp_path / name)] for name in ("whole", "a")]
    courses = [[(r["step"], r["loss"], r["fingerprint"]) for r in log] for log in logs]
    assert courses[0] == courses[1], seed
    assert len(courses[0]) == steps
    assert not list((tmp_path / "a").rglob(".*"))
