"""``--claim splits --model DIR --data F --splits 1x8,2x4,8x1``: do cuts of the user's own batches give one adapter?"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from verify.claims import splits
from verify.claims.outcome import Outcome
from verify.oracle.digest import md5_of_tensor
from verify.subject import BadSubject, Cut

STEPS, SEED, RATE = 2, 0, 2e-4
DEFAULT_SPLITS = "1x8,2x4,8x1"
STATEMENT = (
    "Two optimiser steps of this model on this data give one adapter however each global batch is cut (AxB: A "
    "micro-batches of B sequences); the cuts ran as asked, and the adapter moved."
)


@dataclass(frozen=True)
class ModelRun:
    """MD5 of every adapter tensor after each step, in the model's order; padded tokens of each forward of each step."""

    digests: list[dict[str, str]]
    ran: tuple[tuple[int, ...], ...]

    def short(self) -> str:
        """One short digest a step."""
        return ", ".join(f"step {i}: {_one(step)}" for i, step in enumerate(self.digests, 1))


def _one(step: dict[str, str]) -> str:
    return md5_of_tensor(torch.tensor([int(d[:8], 16) for _, d in sorted(step.items())]))[:12]


@dataclass
class Trace:
    """MD5 of each document's rows at every module's input and output and at the gradient of its output, in order."""

    events: list[tuple[str, int, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def watch(self, model: torch.nn.Module, spans: Sequence[tuple[int, int]], lines: Sequence[int]) -> Iterator[None]:
        """Record one forward and backward over a stream whose documents lie at ``spans`` [start, stop)."""
        hooks = []
        total = None

        def note(label: str, value) -> None:
            for tensor in _streams_in(value, total):
                for (start, stop), line in zip(spans, lines):
                    self.events.append((label, line, md5_of_tensor(tensor[start:stop])))

        def first(module, args, kwargs) -> None:
            nonlocal total
            ids = kwargs.get("input_ids", args[0] if args else None)
            total = ids.shape[1]

        def before(path):
            return lambda module, args, kwargs: note(f"the input of {path}", [*args, *kwargs.values()])

        def after(path):
            def hook(module, args, output) -> None:
                note(f"the output of {path}", output)
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda g: note(f"the gradient of the output of {path}", g))

            return hook

        decoder = model.get_decoder()
        hooks.append(decoder.register_forward_pre_hook(first, with_kwargs=True))
        for path, module in decoder.named_modules():
            if path:
                named = f"{path} ({type(module).__name__})"
                hooks.append(module.register_forward_pre_hook(before(named), with_kwargs=True))
                hooks.append(module.register_forward_hook(after(named)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def first_difference(self, other: Trace) -> str:
        """Where two traces part, with the last place where they agreed; what that means if they do not part."""
        theirs: dict[tuple[str, int], list[str]] = {}
        for label, line, digest in other.events:
            theirs.setdefault((label, line), []).append(digest)
        agreed: dict[int, str] = {}
        # Micro-batches of one cut come one after another: each document by itself is in the order of the model.
        parted: dict[int, tuple[int, str]] = {}
        places: dict[int, int] = {}
        for label, line, digest in self.events:
            wanted = theirs.get((label, line), [None])
            same = (wanted.pop(0) if wanted else None) == digest
            places[line] = places.get(line, 0) + 1
            if same and line not in parted:
                agreed[line] = label
            elif not same:
                parted.setdefault(line, (places[line], label))
        if not self.events:
            return "nothing of the model could be watched"
        if not parted:
            return "all activations and gradients of every sequence agree: it is the sum over tokens that differs"
        line, (_, label) = min(parted.items(), key=lambda item: (item[1][0], item[0]))
        last = agreed.get(line, "nothing")
        return f"{label} is the first that differs, of the sequence in line {line}; the last that agrees is {last}"


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in values for tensor in _tensors(one)]


def _streams_in(value, total: int | None) -> list[torch.Tensor]:
    """Floating tensors [total, ...] in ``value``; a leading axis of size 1 is dropped."""
    flat = [t[0] if t.dim() > 2 and t.shape[0] == 1 else t for t in _tensors(value) if t.is_floating_point()]
    return [t for t in flat if t.dim() > 1 and t.shape[0] == total]


def cuts_from(text: str) -> dict[str, Cut]:
    """``1x8,2x4``: A micro-batches of B sequences each, by name.

    Raises:
        BadSubject: another form, fewer than two cuts, or cuts of different batches.
    """
    cuts: dict[str, Cut] = {}
    for name in (part.strip() for part in text.split(",")):
        found = re.fullmatch(r"(\d+)x(\d+)", name)
        if not found or int(found[1]) < 1 or int(found[2]) < 1:
            raise BadSubject(f"--splits: {name!r}; allowed are micro-batches x sequences, such as {DEFAULT_SPLITS}")
        parts, size = int(found[1]), int(found[2])
        cuts[name] = tuple(tuple(range(i * size, (i + 1) * size)) for i in range(parts))
    sizes = {name: sum(map(len, cut)) for name, cut in cuts.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise BadSubject(f"--splits: {told}; allowed are cuts of one batch: equal products")
    if len(cuts) < 2:
        raise BadSubject(f"--splits: {text!r}; allowed are two or more different cuts")
    return cuts


def global_batch(rows: Sequence, batch: int, step: int) -> list:
    """The rows of a step counted from 0: those after the step before, from the file's start again at its end."""
    return [rows[(step * batch + i) % len(rows)] for i in range(batch)]


def check(
    model: str | None, data: str | None, text: str | None, claims: list[str] | None, others: dict
) -> dict[str, Cut]:
    """The cuts, once every argument is known to be good.

    Args:
        others: options that have no place beside ``--model``, by name; falsy where they were not given.

    Raises:
        BadSubject: the first that is not.
    """
    for name, value in (("--model", model), ("--data", data)):
        if not value:
            raise BadSubject(f"{name}: missing; --model, --data and --splits go together")
    if claims not in (None, [], [splits.NAME]):
        raise BadSubject(f"--claim: {', '.join(claims)}; allowed beside --model is splits")
    for name, value in others.items():
        if value:
            raise BadSubject(f"{name}: {value!r}; not allowed beside --model")
    cuts = cuts_from(DEFAULT_SPLITS if text is None else text)
    if not pathlib.Path(model).is_dir():
        raise BadSubject(f"--model: {model!r}; allowed is a folder that exists")
    if not pathlib.Path(data).is_file():
        raise BadSubject(f"--data: {data!r}; allowed is a file that exists")
    return cuts


def load(model: str, data: str, device: str, cuts: dict[str, Cut]):
    """The model with its rows.

    Raises:
        BadSubject: the model or the data cannot be used.
    """
    from verify.subjects_model import OwnModel  # a subject of one's own needs no fastlora

    return OwnModel(model, data, device, sum(map(len, next(iter(cuts.values())))))


def run(subject, cuts: dict[str, Cut]) -> list[Outcome]:
    """One outcome for a loaded model: every cut, and in its notes PEFT and float sums on the same cuts."""
    begun = time.monotonic()
    out = Outcome(splits.NAME, STATEMENT, pathlib.Path(subject.folder).resolve().name)
    out.tags |= {subject.device.type, subject.dtype_name, "own-model"}
    for module, reason in subject.not_exact:
        out.note(f"exactness not claimed: {module}: {reason}")
    try:
        judge(subject, cuts, out)
    # A crash of the subject is a failure of the claim.
    except Exception as error:
        out.fail(f"raised {type(error).__name__}: {error}")
        return [out]
    control = {name: subject.train(cut, float_sums=True) for name, cut in cuts.items()}
    out.note(_told("control: float sums", control))
    if importlib.util.find_spec("peft") is None:
        out.note("PEFT is not installed: not tried")
    else:
        out.note(_peft(subject, cuts))
    out.seconds = time.monotonic() - begun
    return [out]


def _peft(subject, cuts: dict[str, Cut]) -> str:
    """What PEFT gives for the same cuts, or why it gives nothing: no verdict hangs on it."""
    from verify.peft_loop import train

    rows = [global_batch(subject.rows, subject.batch, step) for step in range(STEPS)]
    targets = subject.targets
    try:
        plain = train(subject.plain(), rows, cuts, targets, SEED, RATE)
    except Exception as error:
        return f"PEFT in a plain loop raised {type(error).__name__}: {str(error).splitlines()[:1]}"
    return _told("PEFT in a plain loop", {name: ModelRun(digests, ()) for name, digests in plain.items()})


def judge(subject, cuts: dict[str, Cut], out: Outcome) -> None:
    """Every cut against the first: equal digests, or the first tensor that differs and what did it."""
    runs: dict[str, ModelRun] = {}
    for name, cut in cuts.items():
        runs[name] = result = subject.train(cut)
        out.cases += 1
        out.note(f"{name}: {result.short()}")
        right = all(len(ran) == len(cut) for ran in result.ran)
        out.check(right, f"control: {name} ran forwards of {result.ran} tokens, not {len(cut)} a step")
    name, first = next(iter(runs.items()))
    totals = {tuple(map(sum, result.ran)) for result in runs.values()}
    out.check(len(totals) == 1, f"control: the cuts ran different tokens: {sorted(totals)}")
    begin = {n: md5_of_tensor(t) for n, t in subject.start.items()}
    still = [n for n, digest in first.digests[-1].items() if digest == begin[n]]
    out.check(not still, f"control: {len(still)} tensors did not move in {STEPS} steps, first {still[:1]}")
    for other, result in runs.items():
        apart = first_apart(first, result)
        if apart is not None:
            step, tensor = apart
            traces = Trace(), Trace()
            for cut, trace in zip((cuts[name], cuts[other]), traces):
                subject.train(cut, trace=(step, trace))
            why = traces[0].first_difference(traces[1])
            out.fail(f"{name} and {other} differ after step {step + 1}, first in {tensor}: {why}")


def first_apart(one: ModelRun, two: ModelRun) -> tuple[int, str] | None:
    """(step from 0, tensor) of the first difference, in the model's order."""
    for step, (a, b) in enumerate(zip(one.digests, two.digests)):
        for name in a:
            if a[name] != b[name]:
                return step, name
    return None


def _told(what: str, runs: dict[str, ModelRun]) -> str:
    kinds = len({tuple(_one(step) for step in run.digests) for run in runs.values()})
    each = "; ".join(f"{name} {_one(run.digests[-1])}" for name, run in runs.items())
    return f"{what}: {kinds} adapter{'s' if kinds > 1 else ''} from {len(runs)} cuts ({each})"
