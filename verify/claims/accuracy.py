"""accuracy: every element of y, dx, dA and dB lies within its rounding bound of the float64 oracle."""

from __future__ import annotations

import time
from collections import Counter

from verify import graphs, oracle, relations
from verify.bounds import at_home
from verify.claims.outcome import Budget, Outcome
from verify.judge import around, judge
from verify.oracle.linear import scale_of
from verify.strategies import LinearCase, affordable, endless, short_names
from verify.subject import EXACT, LinearInputs, LinearResult, Refused, Subject

NAME = "accuracy"
STATEMENT = (
    "Every element of y, dx, dA and dB of the LoRA linear, in every mode, lies within the rounding "
    "bound of its own operation graph around a float64 oracle; the LoRA part is judged alone too; and permuted tokens, "
    "a moved scale, a rank split or padded and projections joined give what algebra says."
)

# Outputs that must come in the working dtype; dA and dB are of the declared dtype of token sums.
OUTPUTS = ("y", "dx", "da", "db")
# Of so many cases one is tried in other shapes too, which takes some ten calls.
RELATED = 4


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """Try cases in the order of ``seed`` until the budget ends."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    part = subject.linear
    if part is None:
        out.reason = "the subject has no LoRA linear"
        return out
    names = short_names(part.dtypes)
    alone = refused = 0
    kinds, tried = Counter(), Counter()
    for case in endless("linear", names, seed, getattr(part, "cases_a_shape", 1)):
        if not budget.more(out.cases) or (budget.stop_at_failure and out.failures):
            break
        out.cases += 1
        out.tags |= {subject.device, case.dtype, *subject.tags}
        alone += case.values in ("lora_alone", "grid")
        kinds[case.values] += 1
        refused += sum(_one(subject, case, mode, out) for mode in part.modes)
        if out.cases % RELATED == 0 and not case.dropout and affordable(case, part):
            _related(subject, case, part.modes[out.cases // RELATED % len(part.modes)], out, tried)
    out.note(f"LoRA part alone (W = 0, or integers where the base product is exact): {alone} cases")
    if tried:
        out.note("relations tried: " + ", ".join(f"{name} {tried[name]}" for name in relations.RELATIONS))
    out.note("values: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    if 1 - 1e-9 < out.worst <= 1:
        out.note(
            "a share of 1 is one rounding at its very edge: halfway cases meet a bound that is tight"
        )
    if refused:
        out.note(f"documented refusals: {refused}")
    out.seconds = time.monotonic() - begun
    return out


def _one(subject: Subject, case: LinearCase, mode: str, out: Outcome) -> bool:
    """Judge one case in one mode; True if it was refused."""
    inputs, part = case.inputs(subject.device), subject.linear
    where = f"{subject.name}, {mode}, {case!r}"
    divisor = float(1 + case.seed % 977) if mode == EXACT else 1.0
    rules = part.roundings(inputs.x.dtype, mode)
    try:
        result = part.run(inputs, mode, divisor)
    except Refused:
        return True
    # A crash of the subject is a failure of the claim, told with the case.
    except Exception as error:
        out.fail(f"raised {type(error).__name__}: {error}; {where}")
        return False
    bounds = bounds_of(inputs, result, rules, divisor)
    kinds = {"y": inputs.x.dtype, "dx": inputs.x.dtype, "da": rules.sums, "db": rules.sums}
    for name in OUTPUTS:
        got, bound = getattr(result, name), getattr(bounds, name)
        if got.dtype != kinds[name]:
            out.fail(f"{name} is {got.dtype}, not {kinds[name]}; {where}")
        judged = judge(got, bound)
        out.share(judged.share, f"{judged.sentence(name)}; {where}")
        if judged.skipped:
            out.note("elements whose exact value overflows the dtype are not judged")
    return False


def _related(subject: Subject, case: LinearCase, mode: str, out: Outcome, tried: Counter) -> None:
    """The relations between calls that need no oracle."""
    inputs, part = case.inputs(subject.device), subject.linear
    where = f"{subject.name}, {mode}, {case!r}"
    try:
        seen = set()
        for name, (failed, share, sentence) in relations.related(part, inputs, mode, part.run(inputs, mode)):
            seen.add(name)
            if failed is None:
                out.share(share, f"{name}: {sentence}, {share:.3g} of the bound; {where}")
            else:
                out.check(not failed, f"{name}: {sentence}; {where}")
        tried.update(seen)
    except Refused:
        return
    except Exception as error:
        out.fail(f"raised {type(error).__name__}: {error}; relations of {where}")


def bounds_of(
    inputs: LinearInputs, result: LinearResult, rules, divisor: float
) -> graphs.LinearBounds:
    """Radii from the graph around values from the oracle (which the graph must agree with)."""
    keep = None if result.keep is None else at_home(result.keep)
    tensors = [
        t if t is None else at_home(t)
        for t in (inputs.x, inputs.weight, inputs.a, inputs.b, inputs.bias, inputs.dy)
    ]
    x, weight, a, b, bias, dy = tensors
    if rules.adapter is not None:
        a, b = a.to(rules.adapter), b.to(rules.adapter)
    scale = scale_of(inputs.alpha, inputs.rank, inputs.rslora)
    radii = graphs.lora_linear(
        x, weight, a, b, scale, bias, dy, keep, inputs.dropout, rules, divisor
    )
    y = oracle.lora_linear_forward(x, weight, a, b, scale, bias, keep=keep, p=inputs.dropout)
    grads = oracle.lora_linear_backward(dy, x, weight, a, b, scale, keep=keep, p=inputs.dropout)
    return graphs.LinearBounds(
        y=around(y, radii.y),
        dx=around(grads.dx, radii.dx),
        da=around(grads.da / divisor, radii.da),
        db=around(grads.db / divisor, radii.db),
    )
