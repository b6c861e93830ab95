"""The step level: a whole model of a named shape, one system after another, each beside the frozen model in turns.

The frozen model (eager transformers, sdpa, the embedding's output requires a gradient) stays on the device as long as memory
allows; a system is built, checked if it is ours, warmed, timed in turns with the frozen model and its A/A control, and freed before the
next one. Where two do not fit, the frozen model is timed alone before and after instead. A system that cannot be built or
runs out of memory is reported with its reason, not left out.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import pathlib
import re
import time
from collections.abc import Callable, Sequence

import torch

from bench import check, nonexact, peers, systems, timing
from bench.into import earlier, together
from bench.provenance import provenance, write_result
from bench.shapes import Shape, default_dtype
from bench.tables import costs, ratio_text
from fastlora.data import Row
from fastlora.errors import InputError
from fastlora.packing import fill_ratio

GIB = 2**30
FROZEN = "frozen"
ALIGNMENTS = (128, 64, 32)
# Bytes that may stay allocated when a system is gone: workspaces of libraries, cached scales and positions.
LEFT_OVER = 256 * 2**20
# What a system may take at most, built and timed; whole models are compiled in minutes.
SYSTEM_SECONDS, COMPILE_SECONDS = 25.0, 120.0
# Room that two models beside each other need beyond what was counted: the allocator's fragments.
MARGIN = 5 * 2**30
# Variants are compared with their base system; only these are timed with the optimiser's step too.
_PLAIN = frozenset({"ckpt", "liger", "compile", "layers"})
_ATTENTION = re.compile(r"flash|fmha|cudnn|sdpa|attention|efficient", re.IGNORECASE)


def default_systems(shape: Shape) -> list[str]:
    """What a run without ``--systems`` times, what is most asked for first: a time limit cuts at the end. What exactness costs needs no
    system of its own: it is timed in turns with ``fastlora``."""
    liger, flash = peers.installed("liger_kernel"), peers.installed(peers.FLASH)
    peer = "peft+liger" if liger else "peft"
    names = ["fastlora", "fastlora+ckpt", peer, f"{peer}+ckpt", f"{peer}+fp32", f"{peer}+fp32+ckpt"]
    names += ["fastlora+dropout", "fastlora+r128", "fastlora+t2048", "fastlora+rows", f"{peer}+rows"]
    names += ["fastlora+cap79", "fastlora+ckpt+t2048+cap23"] if shape.name == "llama-3.1-8b" else []
    names += ["frozen+liger+layers" if liger else "frozen+layers"]
    names += ["peft", "peft+ckpt"] if liger else []
    names += ["fastlora+rows+align64", "fastlora+library", "fastlora+library+align64", f"{peer}+library"]
    names += [f"peft+{lengths}+fa2" for lengths in ("rows", "library") if flash]
    names += [f"peft+{lengths}" for lengths in ("rows", "library") if liger]
    # whole models are compiled in minutes
    names += ["frozen+liger+compile" if liger else "frozen+compile", "peft+compile"]
    return names


@dataclasses.dataclass
class Plan:
    """How to run: sizes, limits, and where to say what was found."""

    shape: Shape
    device: str
    dtype: torch.dtype
    tokens: int = 8192
    rank: int = 16
    samples: int = 5
    time_limit: float = 510.0
    optimizer: bool = True
    commit: str | None = None
    say: Callable[[str], None] = print
    begun: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self.time_limit - (time.monotonic() - self.begun)


def free() -> None:
    """Give memory back: cycles, compiled code, the allocator's cache."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes allocated on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class Session:
    """The frozen model and the systems timed beside it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.frozen: systems.Running | None = None
        self.checked: dict[tuple, check.Verdict] = {}
        self.alone: timing.Timing | None = None
        self.fits_beside = True

    def parse(self, name: str) -> systems.Spec:
        """The system of that name at this run's sizes."""
        return systems.parse(name, tokens=self.plan.tokens, rank=self.plan.rank)

    def start(self, spec: systems.Spec) -> systems.Running:
        """Build a system."""
        return systems.start(spec, self.plan.shape, self.plan.device, self.plan.dtype)

    def frozen_row(self) -> dict:
        """The frozen model by itself: time, memory, its attention kernel."""
        before = allocated()
        self.frozen = self.start(self.parse(FROZEN))
        self.frozen.step()
        names = _launches(self.frozen.step)
        resident = allocated() - before
        peak = _peak_since(before, self.frozen.step)
        if peak is not None:
            self.fits_beside = peak + resident + MARGIN <= torch.cuda.get_device_properties(0).total_memory
        taken = self._interleaved({FROZEN: self.frozen.step})
        self.alone = taken[FROZEN]
        attention = sorted({name for name in names if _ATTENTION.search(name)})
        return self._describe(self.parse(FROZEN), self.frozen, peak) | {
            "time": taken[FROZEN].as_dict(), "over_frozen": {"median": 1.0, "low": 1.0, "high": 1.0}, "how": "alone",
            "control": timing.control_dict(timing.control(taken, FROZEN)), "launches": sum(names.values()) or None,
            "attention_kernels": attention[:8],
        }  # fmt: skip

    def row(self, name: str) -> dict:
        """Check, time and describe one system; a reason in place of figures where there are none."""
        spec = self.parse(name)
        begun = time.monotonic()
        try:
            if spec.base == "fastlora":
                verdict = self.verdict(spec)
                if not verdict.passed:
                    return {"system": name, "not_timed": f"fails verification: {verdict.reason}"}
            found = self.capped(spec) if spec.cap_gib else self.timed(spec)
            if spec.base == "fastlora":
                found["verified"] = {"worst_share": verdict.worst, "notes": list(verdict.notes)}
        except InputError as error:
            found = {"system": name, "not_timed": str(error)}
        except Exception as error:  # one system's failure must not cost the others' figures
            short = " ".join(str(error).split())[:300]
            what = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {short}"
            found = {"system": name, "not_timed": what}
        free()
        found["seconds"] = round(time.monotonic() - begun, 1)
        return found

    def verdict(self, spec: systems.Spec) -> check.Verdict:
        """The check of a configuration, once for all that run the same code."""
        key = (spec.rank, spec.dropout, spec.flags & {"float", nonexact.NAME, "ckpt"}, spec.aligned(self.plan.device))
        if key not in self.checked:
            self.checked[key] = check.model(spec, self.plan.shape, self.plan.device, self.plan.dtype)
            free()
        return self.checked[key]

    def timed(self, spec: systems.Spec) -> dict:
        """A system beside the frozen model in turns, or one after the other where both do not fit."""
        if self.fits_beside:
            try:
                return self._beside(spec)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        # Outside the except block: the error held every activation of the failed step.
        self.drop_frozen()
        return self._after(spec)

    def _beside(self, spec: systems.Spec) -> dict:
        if self.frozen is None:
            self.frozen = self.start(self.parse(FROZEN))
        before = allocated()
        running = self.start(spec)
        try:
            peak = self._warm(running, before)
            calls = {FROZEN: self.frozen.step, spec.name: running.step}
            if running.update and self.plan.optimizer and self._is_plain(spec):
                calls["with optimizer"] = running.full_step
            others = {name: call for name, call in running.others.items() if self.verdict(self.parse(name)).passed}
            taken = self._interleaved(calls | others)
            found = self._describe(spec, running, peak) | {"how": "interleaved"}
            if others:
                found["over"] = {name: timing.ratio(taken[spec.name], taken[name]).as_dict() for name in others}
            found |= self._figures(spec.name, taken) | {"launches": sum(_launches(running.step).values()) or None}
        finally:
            running.close()
        del running
        free()
        left = allocated() - before
        if left > LEFT_OVER:
            found["notes"].append(f"{left / GIB:.2f} GiB stayed allocated afterwards")
        return found

    def _is_plain(self, spec: systems.Spec) -> bool:
        return spec.flags <= _PLAIN and (spec.rank, spec.tokens) == (self.plan.rank, self.plan.tokens)

    def _after(self, spec: systems.Spec) -> dict:
        before = allocated()
        running = self.start(spec)
        try:
            peak = self._warm(running, before)
            own = timing.interleaved({spec.name: running.step}, self.plan.device, samples=self.plan.samples, warm_up=1)
            found = self._describe(spec, running, peak)
        finally:
            running.close()
        del running
        free()
        self.frozen = self.start(self.parse(FROZEN))
        taken = self._interleaved({FROZEN: self.frozen.step})
        # The frozen model's times from before and after, so that a drift of the clock shows in the spread.
        around = [*self.alone.samples, *taken[FROZEN].samples]
        median = own[spec.name].median
        ratios = timing.Ratio(tuple(median / value for value in around))
        return found | {
            "how": "one after the other: two models do not fit", "time": own[spec.name].as_dict(),
            "over_frozen": ratios.as_dict(), "frozen_ms": timing.quantile(around, 0.5),
            "control": timing.control_dict(timing.control(taken, FROZEN)),
        }  # fmt: skip

    def _warm(self, running: systems.Running, before: int) -> int | None:
        """Two steps, with the optimiser's state in memory from the first on, and the peak of the second."""
        whole = running.full_step if running.update else running.step
        whole()
        return _peak_since(before, whole)

    def capped(self, spec: systems.Spec) -> dict:
        """Whether a system fits a smaller card: the allocator capped, nothing else on the device."""
        found = {"system": spec.name, "cap_gib": spec.cap_gib}
        if self.plan.device == "cpu":
            return found | {"not_timed": "memory is capped on a GPU alone"}
        total = torch.cuda.get_device_properties(0).total_memory
        if spec.cap_gib * GIB > total:
            return found | {"not_timed": f"the card has {total / GIB:.0f} GiB"}
        self.drop_frozen()
        running = None
        torch.cuda.set_per_process_memory_fraction(spec.cap_gib * GIB / total)
        try:
            running = self.start(spec)
            peak = self._warm(running, 0)
            taken = timing.interleaved({spec.name: running.full_step}, self.plan.device, samples=3, warm_up=1)
            reserved = torch.cuda.max_memory_reserved()
            found |= self._describe(spec, running, peak) | {
                "fits": True, "time": taken[spec.name].as_dict(), "reserved_bytes": reserved, "how": "alone, with optimizer",
            }  # fmt: skip
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found["fits"] = False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            if running is not None:
                running.close()
        return found

    def drop_frozen(self) -> None:
        """Free the frozen model."""
        if self.frozen is not None:
            self.frozen.close()
            self.frozen = None
        free()

    def _interleaved(self, calls: dict) -> dict[str, timing.Timing]:
        return timing.interleaved(calls, self.plan.device, base=FROZEN, samples=self.plan.samples, warm_up=1)

    def _describe(self, spec: systems.Spec, running: systems.Running, peak: int | None) -> dict:
        return {
            "system": spec.name, "rank": None if spec.base == FROZEN else spec.rank, "tokens": running.tokens,
            "padded_tokens": running.padded, "supervised_tokens": running.supervised, "peak_bytes": peak,
            "notes": list(running.notes),
        }  # fmt: skip

    def _figures(self, name: str, taken: dict[str, timing.Timing]) -> dict:
        own, base = taken[name], taken[FROZEN]
        found = {
            "time": own.as_dict(), "frozen_ms": base.median, "over_frozen": timing.ratio(own, base).as_dict(),
            "control": timing.control_dict(timing.control(taken, FROZEN)),
        }  # fmt: skip
        if "with optimizer" in taken:
            found["with_optimizer"] = timing.ratio(taken["with optimizer"], base).as_dict() | {
                "median_ms": taken["with optimizer"].median
            }
        return found


def _peak_since(before: int, call: Callable[[], object]) -> int | None:
    """Most bytes allocated during a call beyond ``before``: with the system's weights, without what else lies on the device."""
    grown = timing.peak_memory(call, "cuda" if torch.cuda.is_available() else "cpu")
    return None if grown is None else grown + allocated() - before


def _launches(call: Callable[[], object]) -> collections.Counter[str]:
    """Kernels of one call by name; empty where the profiler does not run."""
    try:
        return timing.launches(call)
    except RuntimeError as error:
        print(f"launches are not counted: {' '.join(str(error).split())[:200]}")
        return collections.Counter()


def fills(rows: Sequence[Row]) -> dict[str, float]:
    """Real tokens over padded ones, by alignment."""
    return {str(alignment): fill_ratio([len(row) for row in rows], alignment) for alignment in ALIGNMENTS}


def run(
    plan: Plan, names: Sequence[str] | None, path: str | pathlib.Path | None, into: str | pathlib.Path | None = None,
) -> dict:
    """Time ``names`` (None: the default ones) and write the result after each, so that a run cut short leaves what it found.

    Args:
        into: an earlier result whose rows of other systems are kept (see bench/into.py).

    Raises:
        InputError: an unknown system, or an ``into`` of another model or device.
    """
    session = Session(plan)
    names = [name for name in (names or default_systems(plan.shape)) if name != FROZEN]
    for name in names:
        session.parse(name)
    result = {
        "kind": "step", "shape": plan.shape.name, "layers": plan.shape.layers, "tokens": plan.tokens, "rank": plan.rank,
        "dtype": str(plan.dtype).removeprefix("torch."), "provenance": provenance(plan.commit), "rows": [],
        "fill": {
            lengths: fills(systems.parse(f"fastlora+{lengths}", tokens=plan.tokens).rows(plan.shape.vocabulary, "cpu"))
            for lengths in ("rows", "library")
        },
    }  # fmt: skip

    before, own = [] if into is None else earlier(into, result), []

    def keep(row: dict) -> None:
        plan.say(line(row))
        own.append(row)
        result["rows"] = together(own, before, result["provenance"]["commit"])
        result["exact_over"] = costs(result["rows"])
        result["seconds"] = round(plan.time_limit - plan.left, 1)
        if path is not None:
            write_result(path, result)

    keep(session.frozen_row())
    for name in names:
        if plan.left < (COMPILE_SECONDS if "compile" in session.parse(name).flags else SYSTEM_SECONDS):
            keep({"system": name, "not_timed": f"the time limit of {plan.time_limit:.0f} s was near"})
        else:
            keep(session.row(name))
    session.drop_frozen()
    for text in ratio_text(result):
        plan.say(text)
    return result


def line(row: dict) -> str:
    """One line for the terminal."""
    name = f"{row['system']:28s}"
    if "not_timed" in row:
        return f"{name} not timed: {row['not_timed']}"
    memory = "" if row.get("peak_bytes") is None else f"  {row['peak_bytes'] / GIB:.1f} GiB"
    if "fits" in row:
        verdict = "fits" if row["fits"] else "does not fit"
        return f"{name} {verdict} {row['cap_gib']} GiB{memory}"
    milliseconds, ratio = row["time"]["median_ms"], row["over_frozen"]
    speed = row["supervised_tokens"] / milliseconds * 1e3
    text = f"{name} {milliseconds:9.1f} ms  {ratio['median']:.3f} x frozen ({ratio['low']:.3f}-{ratio['high']:.3f})"
    text += f"  A/A {row['control']['median']:.3f}{memory}  {speed:.0f} supervised tokens/s"
    if "with_optimizer" in row:
        text += f"  with optimizer {row['with_optimizer']['median']:.3f} x"
    return text


def plan_for(shape: Shape, device: str, **options) -> Plan:
    """A plan on ``device`` in its dtype."""
    return Plan(shape, device, default_dtype(device), **options)
