"""parity: PEFT reads what the subject writes and the other way round, and both compute the same.

The file must hold the same bits under the same names; the models' fp32 logits must agree within a derived bound
(``verify/logits.py``), beside which the bare model's must lie far outside, or equality would prove nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Iterator

import torch

from verify import peft_files
from verify.bounds import Accumulator, Bounded, accumulate, exact, store
from verify.claims.invariance import same_bits
from verify.claims.outcome import Budget, Outcome
from verify.judge import judge
from verify.logits import logit_bound
from verify.strategies import endless
from verify.strategies_adapter import AdapterCase
from verify.subject import Subject

NAME = "parity"
STATEMENT = (
    "An adapter that the subject writes has in PEFT the same bits, names and scales, and gives logits within their "
    "rounding bound, with rsLoRA and patterns of ranks and alphas; so has one of PEFT's in the subject; merged, each weight "
    "is W + s B A within its bound, unmerged it has its bytes again, and transformers gives the adapter's logits from the "
    "saved merged model."
)


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """Adapters in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    if subject.files is None:
        out.reason = "the subject has no adapter files"
    elif importlib.util.find_spec("peft") is None:
        out.reason = "PEFT is not installed"
    if out.reason:
        return out
    for case in endless("adapter", (), seed):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        out.cases += 1
        out.tags |= {subject.device, "fp32", "peft", *subject.tags}
        where = f"{subject.name}, {case!r}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                _one(subject, case, pathlib.Path(folder), out, where)
        # A crash of the subject, or of PEFT on its files, is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {where}")
    out.seconds = time.monotonic() - begun
    return out


def _one(subject: Subject, case: AdapterCase, folder: pathlib.Path, out: Outcome, where: str) -> None:
    """Out, back, and merged."""
    files = subject.files

    def base() -> torch.nn.Module:
        return case.model().to(subject.device).eval()

    ours = files.attach(base(), case.config(), case.seed).eval()
    files.save(ours, str(folder / "ours"))
    theirs = peft_files.load(base(), folder / "ours")
    _same_state(files.state(ours), peft_files.state(theirs), "PEFT has of the subject's file", out, where)
    _same_scales(theirs, case, out, where)
    ids = case.tokens().to(subject.device)
    bound = logit_bound(theirs, ids, last=1)
    wanted = _logits(theirs, ids)
    bare = float(((_logits(base(), ids) - wanted).abs() / bound).max())
    out.check(bare > 1, f"control: the bare model's logits are within the bound: the adapter does nothing; {where}")
    allowed = Bounded(wanted, bound)
    _judged(_logits(ours, ids), allowed, "the subject's logits against PEFT's", out, where)

    own = peft_files.attach(base(), case.config(), case.seed)
    odd = sorted(set(peft_files.state(own)) ^ set(files.state(ours)))
    out.check(not odd, f"for one configuration PEFT and the subject adapt other modules: {odd[:3]}; {where}")
    own.save_pretrained(folder / "theirs")
    read = files.load(base(), str(folder / "theirs")).eval()
    _same_state(peft_files.state(own), files.state(read), "the subject has of PEFT's file", out, where)
    allowed = Bounded(_logits(own, ids), logit_bound(own, ids, last=1))
    _judged(_logits(read, ids), allowed, "the subject's logits of PEFT's adapter", out, where)

    _merged(files, case, ours, theirs, Bounded(wanted, bound), ids, folder, out, where)


def _merged(files, case, ours, theirs, allowed: Bounded, ids, folder: pathlib.Path, out: Outcome, where: str) -> None:
    """Every weight of the merged model, and its logits once transformers has read it from disk."""
    from transformers import AutoModelForCausalLM

    expected = {}
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (exact(getattr(module, name)["default"].weight) for name in ("lora_A", "lora_B"))
            scaled = Bounded(case.scale(path) * b.value, b.radius)
            # Products and the sum in fp32, in any order, one rounding for the scale; rounded once at the end.
            terms = accumulate([(scaled, a)], [exact(module.base_layer.weight)], Accumulator())
            terms = Bounded(terms.value, terms.radius + Accumulator().factor(torch.tensor(2.0)) * terms.magnitude)
            expected[path] = store(terms, torch.float32)
    if hasattr(files, "merge_and_back"):
        held = {name: p.detach().clone() for name, p in ours.named_parameters()}
        back = dict(files.merge_and_back(ours).named_parameters())
        moved = [name for name, p in held.items() if name not in back or not same_bits(p, back[name].detach())]
        out.check(not moved, f"unmerging does not restore the bytes of {moved[:3]}; {where}")
    plain = files.merge(ours)
    weights = dict(plain.named_modules())
    for path, bound in expected.items():
        _judged(weights[path].weight, bound, f"merged weight of {path}", out, where)
    with _no_bars():
        plain.save_pretrained(folder / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).to(ids.device).eval()
    _judged(_logits(loaded, ids), allowed, "transformers' logits of the merged model", out, where)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' progress bars off; they are the process's, so back on afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of the last token, which sees all of them."""
    return model(input_ids=ids).logits[:, -1:].double().cpu()


def _judged(got: torch.Tensor, bound: Bounded, what: str, out: Outcome, where: str) -> None:
    judged = judge(got, bound)
    out.share(judged.share, f"{judged.sentence(what)}; {where}")


def _same_state(wrote: dict, read: dict, what: str, out: Outcome, where: str) -> None:
    odd = sorted(set(wrote) ^ set(read))
    out.check(not odd, f"tensors that only one side has: {odd[:3]}; {where}")
    other = [n for n in wrote if n in read and not same_bits(wrote[n].detach().cpu(), read[n].detach().cpu())]
    out.check(not other, f"{what} other bits in {other[:3]}; {where}")


def _same_scales(theirs, case: AdapterCase, out: Outcome, where: str) -> None:
    """PEFT's factors from the subject's configuration file, against alpha and rank of the case."""
    found = {
        path: module.scaling["default"]
        for path, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    wrong = {path: (scale, case.scale(path)) for path, scale in found.items() if scale != case.scale(path)}
    out.check(bool(found), f"PEFT finds no adapter in the subject's file; {where}")
    out.check(
        not wrong, f"scale in PEFT of the subject's file, and what it must be: {dict(list(wrong.items())[:2])}; {where}"
    )
