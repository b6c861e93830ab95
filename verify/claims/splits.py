"""splits: the gradients of a global batch do not depend on how it was cut into micro-batches.

With the controls without which one digest proves nothing: the cuts that ran differ, everything
moved, float sums on the same cuts give more than one digest, and dropout 0.1 gives another result
than 0. One digest can be that of a wrong divisor too: the ways in which real trainers divided wrongly are told
apart by name (``verify/ways.py``).
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import torch

from verify import graphs, ways
from verify.bounds import Bounded, gamma, store, unit_roundoff
from verify.claims.outcome import Budget, Outcome
from verify.judge import judge
from verify.oracle.digest import md5_of_tensors
from verify.oracle.linear import scale_of
from verify.strategies import DTYPES, SplitCase, cuts_of, endless, short_names, trained_by
from verify.subject import EXACT, GRAD, Cut, Documents, SplitResult, Subject, TrainCase, TrainResult

NAME = "splits"
STATEMENT = (
    "Cutting a global batch into micro-batches of any sizes and order, empty ones too, on one process or several, "
    "gives the same bits of dA, dB, y and dx, and of the adapter after N steps, for subjects that claim it, and gradients "
    "within their bound for the others; they are those of the mean over supervised tokens; the cuts that ran differ, every "
    "tensor moved, float sums on the same cuts differ, and dropout changes the result."
)

# Of this many cases in a row the last trains a model and the others cut a single linear.
ROUND = 4
# float sums of one batch may agree by chance on a small one; over this many batches they do not.
ENOUGH_FOR_FLOATS = 3
# Processes that are simulated by summing; never more than there are documents.
WORLDS = (2, 3)


@dataclass
class _Floats:
    """Over all cases of one kind: whether float sums on the same cuts ever differed."""

    cases: int = 0
    differed: int = 0
    names: list[str] = field(default_factory=list)


def run(subject: Subject, budget: Budget, seed: int) -> Outcome:
    """Single linears and whole trainings by turns, in the order of ``seed``."""
    out, begun = Outcome(NAME, STATEMENT, subject.name), time.monotonic()
    linear, trainer = subject.linear, subject.trainer
    if trainer is not None and not trainer.bitwise_splits:
        out.note(f"whole model not tried: {trainer.why_not}")
        trainer = None
    if linear is None and trainer is None:
        out.reason = "the subject has neither a LoRA linear nor a trainer that claims splits"
        return out
    names = () if linear is None else short_names(linear.dtypes)
    a_shape = getattr(linear, "cases_a_shape", 1)
    linears = endless("split", names, seed, a_shape) if linear else iter(())
    trainings = trained_by(trainer, endless("train", (), seed)) if trainer else iter(())
    floats = {"linear": _Floats(), "model": _Floats()}
    while budget.more(out.cases) and not (budget.stop_at_failure and out.failures):
        training = linear is None or (trainer is not None and out.cases % ROUND == ROUND - 1)
        case = next(trainings if training else linears, None)
        if case is None:
            break
        out.cases += 1
        out.tags |= {subject.device, *subject.tags}
        try:
            if training:
                _model(subject, case, out, floats["model"])
            else:
                out.tags.add(case.dtype)
                _linear(subject, case, out, floats["linear"])
        # A crash of the subject is a failure of the claim, told with the case.
        except Exception as error:
            out.fail(f"raised {type(error).__name__}: {error}; {subject.name}, {case!r}")
    for kind, seen in floats.items():
        _floats_differ(kind, seen, out)
    out.note(
        "bits equal"
        if linear is None or linear.bitwise_splits
        else "bits not claimed: judged by bound"
    )
    out.seconds = time.monotonic() - begun
    return out


def _floats_differ(kind: str, seen: _Floats, out: Outcome) -> None:
    """The control against a test too weak to see a sum's order."""
    if seen.cases == 0:
        return
    out.note(
        f"control, {kind}: float sums on the same cuts gave more than one digest in {seen.differed} of "
        f"{seen.cases} cases"
    )
    if seen.cases >= ENOUGH_FOR_FLOATS and seen.differed == 0:
        out.fail(
            f"control: float sums never differed between cuts ({kind}): these cuts prove nothing"
        )


def _documents(case: SplitCase, device: str) -> tuple[list, list, tuple]:
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    dtype = DTYPES[case.dtype]
    x = [normal(length, case.k).to(dtype).to(device) for length in case.lengths]
    dy = [normal(length, case.n).to(dtype).to(device) for length in case.lengths]
    weight = (normal(case.n, case.k) / case.k**0.5).to(dtype)
    a, b = normal(case.r, case.k) / case.k**0.5, normal(case.n, case.r) / case.r**0.5
    return x, dy, tuple(t.to(device) for t in (weight, a, b))


def _linear(subject: Subject, case: SplitCase, out: Outcome, floats: _Floats) -> None:
    part = subject.linear
    mode = EXACT if EXACT in part.modes else GRAD
    x, dy, (weight, a, b) = _documents(case, subject.device)
    cuts = cuts_of(len(case.lengths), case.seed)

    def documents(group: tuple[int, ...], dropout: float) -> Documents:
        if not group:
            # An empty micro-batch: one document of no rows.
            return Documents((999,), [x[0][:0]], [dy[0][:0]], weight, a, b, 8.0, dropout, case.seed)
        ids, xs, dys = tuple(1000 + i for i in group), [x[i] for i in group], [dy[i] for i in group]
        return Documents(ids, xs, dys, weight, a, b, 8.0, dropout, case.seed)

    def go(cut: Cut, mode: str, dropout: float = case.dropout) -> SplitResult:
        return part.accumulate([documents(group, dropout) for group in cut], mode)

    results = {name: go(cut, mode) for name, cut in cuts.items()}
    first_two = cuts["one each"][:2]
    cuts["with an empty micro-batch"] = (*first_two, (), *cuts["one each"][2:])
    results["with an empty micro-batch"] = go(cuts["with an empty micro-batch"], mode)
    if hasattr(part, "world"):
        for count in WORLDS:
            name, cut = f"one each on {count} processes", cuts["one each"]
            ranks = [[documents(group, case.dropout) for group in cut[rank::count]] for rank in range(count)]
            cuts[name], results[name] = cut, part.world(ranks, mode)
    where = f"{subject.name}, {case!r}"
    _cuts_differ({name: r.ran for name, r in results.items()}, cuts, out, where)
    first = results["all"]
    for name in ("da", "db"):
        out.check(bool(getattr(first, name).any()), f"control: {name} is all zeros; {where}")
    if part.bitwise_splits:
        digests = {name: md5_of_tensors({"da": r.da, "db": r.db}) for name, r in results.items()}
        _one_digest(digests, "dA and dB", out, where)
        for name, result in results.items():
            same = all(
                torch.equal(p, q) for i in first.rows for p, q in zip(first.rows[i], result.rows[i])
            )
            out.check(
                same, f"y or dx of a document has other bits in '{name}' than in 'all'; {where}"
            )
    if case.dropout == 0:
        within = results if not part.bitwise_splits else {"all": first}
        for name, result in within.items():
            tensors = (x, dy, weight, a, b)
            _within_bound(part, mode, case, tensors, cuts[name], result, out, f"'{name}', {where}")
        wet = go(cuts["all"], mode, 0.1)
        out.check(
            not torch.equal(wet.da, first.da),
            f"control: dropout 0.1 gives the same dA as 0; {where}",
        )
    elif GRAD in part.modes:
        floats.cases += 1
        kinds = {
            md5_of_tensors({"da": r.da, "db": r.db}) for r in (go(c, GRAD) for c in cuts.values())
        }
        floats.differed += len(kinds) > 1


def _within_bound(
    part, mode, case, tensors, cut: Cut, result: SplitResult, out: Outcome, where
) -> None:
    """Integer sums are rounded once; float sums once a micro-batch, and once more when it is added."""
    x, dy, weight, a, b = tensors
    rules, scale = part.roundings(DTYPES[case.dtype], mode), scale_of(8.0, case.r, False)
    groups = [tuple(i for group in cut for i in group)] if rules.fixed_point else [g for g in cut if g]
    sums: dict[str, Bounded] = {}
    for group in groups:
        bounds = graphs.lora_linear(
            torch.cat([x[i] for i in group]), weight, a, b, scale, None,
            torch.cat([dy[i] for i in group]), None, 0.0, rules, documents=len(group),
        )  # fmt: skip
        for name in ("da", "db"):
            new = getattr(bounds, name)
            if name in sums:
                old = sums[name]
                new = store(Bounded(old.value + new.value, old.radius + new.radius), rules.sums)
            sums[name] = new
    for name, bound in sums.items():
        judged = judge(getattr(result, name), bound)
        out.share(judged.share, f"{judged.sentence(name)}; {where}")


def _cuts_differ(ran: dict[str, tuple], cuts: dict[str, Cut], out: Outcome, where: str) -> None:
    """Every cut made as many forwards as it has parts, and equal tokens in all."""
    for name, sizes in ran.items():
        out.check(
            len(sizes) == len(cuts[name]) and sum(sizes) == sum(ran["all"]),
            f"control: cut '{name}' has {len(cuts[name])} micro-batches, but forwards of {sizes} tokens "
            f"ran; {where}",
        )


def _one_digest(digests: dict[str, str], what: str, out: Outcome, where: str) -> None:
    kinds = set(digests.values())
    if len(kinds) > 1:
        told = ", ".join(f"{name}: {digest[:8]}" for name, digest in digests.items())
        out.fail(f"{what} differ between cuts of one batch ({told}); {where}")


def _model(subject: Subject, case: TrainCase, out: Outcome, floats: _Floats) -> None:
    """One training under many cuts, with and without dropout, with one and two threads on CPU."""
    trainer, where = subject.trainer, f"{subject.name}, {case!r}"
    cuts = cuts_of(len(case.lengths), case.seed)
    _named_way(trainer, case, cuts, out, where)
    finals = {}
    for dropout in (0.0, 0.1):
        wet = dataclasses.replace(case, dropout=dropout)
        results = {name: trainer.train(wet, cut) for name, cut in cuts.items()}
        if subject.device == "cpu":
            two = dataclasses.replace(wet, threads=2)
            results["pairs, two threads"] = trainer.train(two, cuts["pairs"])
        by_cut = cuts | {"pairs, two threads": cuts["pairs"]}
        for world in getattr(trainer, "worlds", (1,))[1:]:
            name = f"one each, {world} processes"
            results[name] = trainer.train(dataclasses.replace(wet, world=world), cuts["one each"])
            by_cut[name] = cuts["one each"]
        for step in range(case.steps):
            ran = {name: r.ran[step] for name, r in results.items()}
            _cuts_differ(ran, by_cut, out, f"step {step + 1}, dropout {dropout}, {where}")
            digests = {name: md5_of_tensors(r.after[step]) for name, r in results.items()}
            _one_digest(
                digests, f"adapters after step {step + 1} with dropout {dropout}", out, where
            )
        first = results["all"]
        still = [
            name for name in first.before if torch.equal(first.before[name], first.after[-1][name])
        ]
        out.check(not still, f"control: {still[:3]} did not move in {case.steps} steps; {where}")
        out.check(first.frozen[0] == first.frozen[1], f"frozen weights changed; {where}")
        finals[dropout] = md5_of_tensors(first.after[-1])
        if dropout == 0:
            dry = first
    out.check(
        finals[0.0] != finals[0.1], f"control: dropout 0.1 trains the same adapter as 0; {where}"
    )
    if trainer.run is not None:
        _whole_runs(trainer, case, dry, out, where)
    floats.cases += 1
    some = [
        trainer.train(case, cuts[name], float_sums=True) for name in ("all", "one each", "pairs")
    ]
    floats.differed += len({md5_of_tensors(r.gradients[-1]) for r in some}) > 1


def _named_way(trainer, case: TrainCase, cuts: dict[str, Cut], out: Outcome, where: str) -> None:
    """What the first step's gradients were divided by, without a prompt, with one, and with a sequence that has no
    supervised token, which alone is an empty micro-batch."""
    probes = []
    worlds = getattr(trainer, "worlds", (1,))[:2]
    for changes in ({"prompt": 0}, {"prompt": 2, "masked": (0,)}):
        one = dataclasses.replace(case, steps=1, **changes)
        expected = None
        for name, world in [("all", 1), ("one each", worlds[-1]), ("pairs", 1), ("uneven, shuffled", 1)]:
            result = trainer.train(dataclasses.replace(one, world=world), cuts[name])
            if expected is None:
                expected = ways.sequences(one, result.before, trainer.alignment)
            flat = torch.cat([result.gradients[0][key].double().flatten() for key in result.before])
            probes.append((expected, cuts[name], flat))
    found = ways.name_of(probes)
    out.share(found.right / found.allowed, f"divided wrongly: {found.sentence()}; {where}")


def _whole_runs(trainer, case: TrainCase, pieces: TrainResult, out: Outcome, where: str) -> None:
    """From files, as a user trains: micro-batches of one row, of some, of all, and another order.

    The adapter must have the bits that the harness's own loop over the trainer's pieces gives, and
    the gradient norm logged for step 1 be that of the mean over the harness's own count of tokens.
    """
    forward, pad = tuple(range(len(case.lengths))), trainer.alignment
    padded = sorted(-(-(n + 1) // pad) * pad for n in case.lengths)
    runs = {
        "one row": (padded[-1], forward),
        "some rows, reversed": (padded[-1] + padded[0], forward[::-1]),
        "all rows": (sum(padded), forward),
    }
    results = {name: trainer.run(case, *how) for name, how in runs.items()}
    digests = {name: md5_of_tensors(r.after) for name, r in results.items()}
    digests["the harness's loop"] = md5_of_tensors(pieces.after[-1])
    _one_digest(digests, "adapters of whole runs", out, where)
    cuts = {r.ran for r in results.values()}
    out.check(
        len(cuts) >= 2, f"control: whole runs {list(runs.values())} were all cut alike; {where}"
    )
    gradient = pieces.gradients[0].values()
    expected = sum(float(g.double().square().sum()) for g in gradient) ** 0.5
    # Both norms are float64 sums of the same squares, in two orders: gamma_n of float64 each.
    size = sum(g.numel() for g in gradient)
    slack = 2 * float(gamma(size, unit_roundoff(torch.float64))) * expected
    for name, result in results.items():
        still = [n for n in result.before if torch.equal(result.before[n], result.after[n])]
        out.check(not still, f"control: whole run '{name}': {still[:3]} did not move; {where}")
        out.check(
            abs(result.norm - expected) <= slack,
            f"whole run '{name}' logged gradient norm {result.norm!r} at step 1; that of the mean over "
            f"supervised tokens is {expected!r}; {where}",
        )
