"""AdamW for LoRA parameters: reads the exact gradient sums, computes in float64, stores fp32.

    g = gradient, divided once by the supervised tokens, clipped by its global norm
    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

(Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.) m, v and p are each rounded once, to
fp32, at the end: a decay of lr x 0.01 = 2e-6 keeps its digits, which 1 - 2e-6 in fp32 does not. Everything
is done over fixed blocks, on the CPU each on one thread, and the norm is their correctly rounded sum
(math.fsum), so no bit depends on the number of threads. On a GPU the same operations run in two launches
(ops/adamw_triton.py), with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from fastlora import blocks
from fastlora.errors import InputError, TrainingError
from fastlora.exact import lora_modules, release
from fastlora.ops import backend
from fastlora.token_sum import TokenSum, check_all, units_to_gradient

# Elements worked on at once: what stays in a core's cache; on a GPU what makes launches few.
BLOCK = {"cpu": 2**15}
BLOCK_ELSEWHERE = 2**22
NORM_ROW = 2**12  # squares summed on the device before math.fsum takes over
NORM_BLOCKS = 64  # of a kernel's blocks


@dataclass(frozen=True)
class StepReport:
    """What one step did: the gradient's L2 norm before clipping, and whether it was clipped."""

    grad_norm: float
    clipped: bool


@dataclass(frozen=True)
class _Entry:
    """One parameter of a step, flat: p, its raw gradient (int64 units or fp32), m and v."""

    name: str
    p: torch.Tensor
    raw: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    group: dict
    state: dict


_Piece = tuple[_Entry, slice]


class AdamW(torch.optim.Optimizer):
    """AdamW over the trainable (fp32) parameters of a model, for exact and for ordinary gradients.

    Args:
        model: a module with trainable fp32 parameters, usually from ``fastlora.inject``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW`` (decoupled decay; default 0).
        max_grad_norm: clip the global L2 norm of the gradient to this; None does not clip.
        gradient_scale: a static power of two by which the caller multiplied the loss before backward; the
            gradient is divided by it. It lifts small gradients above 2**-40 (and above fp16's floor).
        loraplus_lr_ratio: the rate of B over that of A (LoRA+, Hayou, Ghosh and Yu 2024; PEFT's name). Other than 1
            makes two parameter groups, A first, each with its own ``lr`` and with ``lr_ratio`` (1 and this), by
            which whoever sets rates must multiply.

    Raises:
        InputError: an argument out of range, or a trainable parameter that is not fp32.
    """

    reads_token_sums = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        gradient_scale: float = 1.0,
        loraplus_lr_ratio: float = 1.0,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "gradient_scale": gradient_scale}
        for name, value in numbers.items():
            _within(name, value, isinstance(value, (int, float)), "a number")
        _within("lr", lr, 0 <= lr < math.inf, "a finite number >= 0")
        _within("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        _within("eps", eps, 0 < eps < math.inf, "a finite number > 0")
        _within("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a finite number >= 0")
        _within("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "None or > 0")
        power = 0 < gradient_scale < math.inf and math.frexp(gradient_scale)[0] == 0.5
        _within("gradient_scale", gradient_scale, power, "a positive power of two")
        _within("loraplus_lr_ratio", loraplus_lr_ratio, 0 < loraplus_lr_ratio < math.inf, "a finite number > 0")
        if not isinstance(model, nn.Module):
            raise InputError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise InputError("model: got one without trainable parameters; call fastlora.inject first")
        for name, p in named:
            if p.dtype != torch.float32 or not p.is_contiguous():
                raise InputError(f"{name}: got {p.dtype}; allowed is contiguous torch.float32 "
                                 "(smaller types lose updates below half a unit in the last place)")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "lr_ratio": 1.0}
        super().__init__(_groups(named, lr, loraplus_lr_ratio), defaults)
        self.max_grad_norm = max_grad_norm
        self.gradient_scale = float(gradient_scale)
        self._model = model
        self._underflow: dict[str, list[int]] = {}
        self._tables: dict[tuple, object] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None, *, supervised_tokens: int | None = None,
             before_update: Callable[[], object] | None = None) -> StepReport:
        """Take one step from the pending exact sums, or from ``.grad`` where there are none.

        Args:
            closure: called first, with gradients enabled (it runs forward and backward).
            supervised_tokens: the global batch's count of supervised tokens. The gradient is that of the SUM
                of token losses and is divided by it once. Needed for exact sums; with ``.grad`` optional.
            before_update: called before the first wait for the device and before a parameter moves: the place to read losses,
                which earlier would leave a GPU without work. What it raises ends the step, the parameters unchanged.

        Raises:
            InputError: called inside an exact block, no or a bad token count, no gradient at all, or
                gradients both in exact sums and in ``.grad``.
            TrainingError: a gradient that is not finite, or an exact sum that may have overflowed. The
                parameters are unchanged and the sums dropped.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        modules = lora_modules(self._model)
        if any(m.exact for _, m in modules):
            raise InputError("step: called inside `with fastlora.exact(model):`; call it after the block")
        pending = any(m.sums is not None and m.sums[0].pending for _, m in modules)
        if supervised_tokens is not None or pending:
            ok = supervised_tokens is not None and 0 < supervised_tokens < math.inf
            _within("supervised_tokens", supervised_tokens, ok, "a number > 0 (exact sums need it)")
        try:
            entries, sums = self._exact_entries(modules) if pending else (self._grad_entries(), [])
            report = self._apply(entries, sums, (supervised_tokens or 1) * self.gradient_scale, before_update)
        finally:
            if pending:
                release([m for _, m in modules])
        return report

    def underflow_shares(self) -> dict[str, float]:
        """Per parameter, the share (0..1) of non-zero partial gradients that fixed point lost or kept under
        10 bits, over all exact steps of this object."""
        return {n: small / filled if filled else 0.0 for n, (filled, small) in self._underflow.items()}

    def underflow_counts(self) -> dict[str, list[int]]:
        """What :meth:`underflow_shares` divides, for a checkpoint: [non-zero partials, those lost or under 10 bits]."""
        return {name: list(counts) for name, counts in self._underflow.items()}

    def restore_underflow_counts(self, counts: dict[str, list[int]]) -> None:
        """Go on counting from :meth:`underflow_counts` of an earlier session."""
        self._underflow = {name: list(pair) for name, pair in counts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, and refuses a state of other parameters.

        Raises:
            InputError: other parameter names or order, or another shape.
        """
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"]):
            names = theirs.get("param_names", mine["param_names"])
            if names != mine["param_names"]:
                odd = sorted(set(names) ^ set(mine["param_names"])) or ["the order differs"]
                raise InputError(f"state_dict: got the state of other parameters ({', '.join(odd[:4])})")
            for index, name, p in zip(theirs["params"], mine["param_names"], mine["params"]):
                saved = state_dict["state"].get(index, {}).get("exp_avg")
                if saved is not None and saved.shape != p.shape:
                    raise InputError(f"state_dict: {name}: got shape {tuple(saved.shape)}; "
                                     f"allowed is {tuple(p.shape)}")
        super().load_state_dict(state_dict)

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor, dict]]:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, p, group

    def _grad_entries(self) -> list[_Entry]:
        entries = [self._entry(name, p, p.grad, group) for name, p, group in self._parameters() if p.grad is not None]
        if not entries:
            raise InputError("step: nothing to step on, neither exact sums nor any .grad; run backward first")
        return entries

    def _exact_entries(self, modules: list[tuple[str, nn.Module]]) -> tuple[list[_Entry], list[tuple[str, TokenSum]]]:
        sums = {}
        for _, m in modules:
            if m.sums is not None and m.sums[0].pending:
                sums[id(m.lora_A.weight)], sums[id(m.lora_B.weight)] = m.sums
        entries, checked = [], []
        for name, p, group in self._parameters():
            if p.grad is not None:
                raise InputError(f"{name}: got a .grad beside exact sums; call zero_grad() first")
            if id(p) not in sums:
                raise InputError(f"{name}: trainable, but no exact sum belongs to it; allowed in exact mode "
                                 "are A and B of LoRA linears")
            checked.append((name, sums[id(p)]))
            entries.append(self._entry(name, p, sums[id(p)].total, group))
        return entries, checked

    def _check(self, sums: list[tuple[str, TokenSum]]) -> None:
        """Refuse sums that are not finite or may have wrapped; count what fixed point lost. Waits for the device."""
        for (name, _), (_, _, filled, small) in zip(sums, check_all(sums), strict=True):
            seen = self._underflow.setdefault(name, [0, 0])
            seen[0] += filled
            seen[1] += small

    def _entry(self, name: str, p: torch.Tensor, raw: torch.Tensor, group: dict) -> _Entry:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        return _Entry(name, p.view(-1), raw.reshape(-1), m, v, group, state)

    def _apply(self, entries: list[_Entry], sums: list[tuple[str, TokenSum]], divisor: float,
               before_update: Callable[[], object] | None) -> StepReport:
        # All that can be launched is launched before the first wait, so that a GPU still at the backward has its next work.
        by_kernel, others = self._by_path(entries)
        buckets = list(_buckets(others))
        squares = _squares(buckets, divisor) + [_rows(table.squares(divisor)) for table, _ in by_kernel]
        if before_update is not None:
            before_update()
        self._check(sums)
        norm = _norm(squares)
        if not math.isfinite(norm):
            bad = next(e.name for e in entries if not _gradient(e.raw, divisor).isfinite().all())
            raise TrainingError(f"{bad}: the gradient is NaN or infinite; no parameter was changed")
        clipped = self.max_grad_norm is not None and norm > self.max_grad_norm
        factor = self.max_grad_norm / norm if clipped else 1.0
        for entry in entries:
            entry.state["step"] += 1
        _each(lambda bucket: _update(bucket, divisor, factor), buckets)
        for table, entry in by_kernel:
            table.update(_scalars(entry, divisor, factor))
        return StepReport(norm, clipped)

    def _by_path(self, entries: list[_Entry]) -> tuple[list[tuple[object, _Entry]], list[_Entry]]:
        """([(parameters of one launch, one of their entries)], entries for torch's operations)."""
        groups: dict[tuple, list[_Entry]] = {}
        others = []
        for entry in entries:
            if entry.p.numel() and backend.pick(entry.p) == "triton":
                kind = (entry.p.device, id(entry.group), entry.state["step"], entry.raw.dtype)
                groups.setdefault(kind, []).append(entry)
            else:
                others.append(entry)
        if not groups:
            return [], others
        from fastlora.ops.adamw_triton import Flat, Parameters, addresses

        made, tables = [], {}
        for kind, members in groups.items():
            flats = [Flat(e.raw, e.p, e.m, e.v) for e in members]
            # the step's number is no part of the table
            key = (kind[0], kind[1], kind[3])
            table = self._tables.get(key)
            if table is None or table.addresses != addresses(flats):
                table = Parameters(flats)
            tables[key] = table
            made.append((table, members[0]))
        self._tables = tables
        return made, others


def _groups(named: list[tuple[str, torch.Tensor]], lr: float, ratio: float) -> list:
    """One group, or A and B apart where they have rates of their own."""
    if ratio == 1:
        return named
    of_b = [(n, p) for n, p in named if n.endswith("lora_B.weight")]
    rest = [(n, p) for n, p in named if not n.endswith("lora_B.weight")]
    groups = [{"params": rest}, {"params": of_b, "lr": lr * ratio, "lr_ratio": ratio}]
    return [group for group in groups if group["params"]]


def _within(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise InputError(f"{name}: got {value!r}; allowed is {allowed}")


def _buckets(entries: list[_Entry]) -> Iterator[list[_Piece]]:
    """Cut parameters into pieces and gather them into blocks that share device, group and step number."""
    bucket: list[_Piece] = []
    free, kind = 0, None
    for entry in entries:
        p = entry.p
        size = BLOCK.get(p.device.type, BLOCK_ELSEWHERE)
        this = (p.device, id(entry.group), entry.state["step"], entry.raw.dtype)
        start = 0
        while start < p.numel():
            if this != kind or free == 0:
                if bucket:
                    yield bucket
                bucket, free, kind = [], size, this
            stop = min(p.numel(), start + free)
            bucket.append((entry, slice(start, stop)))
            free -= stop - start
            start = stop
    if bucket:
        yield bucket


def _each(fn: Callable[[list[_Piece]], None], buckets: list[list[_Piece]]) -> None:
    """Call ``fn`` for every block; those on the CPU are shared out over threads, one thread a block."""
    on_cpu = [b for b in buckets if b[0][0].p.device.type == "cpu"]
    with torch.no_grad():
        blocks.run(fn, on_cpu)
        for bucket in buckets:
            if bucket[0][0].p.device.type != "cpu":
                fn(bucket)


def _gathered(bucket: list[_Piece], of: Callable[[_Entry], torch.Tensor]) -> torch.Tensor:
    return torch.cat([of(entry)[piece] for entry, piece in bucket])


def _gradient(raw: torch.Tensor, divisor: float) -> torch.Tensor:
    """The fp32 gradient, divided once in float64."""
    if raw.dtype == torch.int64:
        return units_to_gradient(raw, divisor)
    if divisor == 1:
        return raw
    by = torch.full((), divisor, dtype=torch.float64, device=raw.device)
    return raw.double().div_(by).float()


def _squares(buckets: list[list[_Piece]], divisor: float) -> list[torch.Tensor]:
    """Sums of squares over rows of fixed length, a float64 tensor a device. Squares of fp32 are exact in float64."""
    rows: dict[int, torch.Tensor] = {}

    def square(bucket: list[_Piece]) -> None:
        g = _gradient(_gathered(bucket, attrgetter("raw")), divisor).double()
        padded = nn.functional.pad(g.mul_(g), (0, -g.numel() % NORM_ROW))
        rows[id(bucket)] = padded.view(-1, NORM_ROW).sum(1)

    _each(square, buckets)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for bucket in buckets:
        by_device.setdefault(bucket[0][0].p.device, []).append(rows[id(bucket)])
    return [torch.cat(parts) for parts in by_device.values()]


def _rows(squares: torch.Tensor) -> torch.Tensor:
    """Fewer sums of squares: those of fixed runs of blocks, added on the device."""
    return nn.functional.pad(squares, (0, -squares.numel() % NORM_BLOCKS)).view(-1, NORM_BLOCKS).sum(1)


def _norm(squares: list[torch.Tensor]) -> float:
    """The global L2 norm. Waits for the devices."""
    # fsum raises on inf - inf only; a NaN or infinity among the rows passes through to the caller.
    return math.sqrt(math.fsum(x for part in squares for x in part.tolist()))


def _hyper(group: dict) -> tuple[float, ...]:
    """lr, weight_decay, eps and both betas of a group, as floats."""
    return (*(float(group[k]) for k in ("lr", "weight_decay", "eps")), *(float(b) for b in group["betas"]))


def _scalars(entry: _Entry, divisor: float, factor: float):
    """What the kernel is told about a step, each number rounded to float64 where :func:`_update` rounds it."""
    from fastlora.ops.adamw_triton import Scalars

    group, t = entry.group, entry.state["step"]
    lr, decay, eps, beta1, beta2 = _hyper(group)
    return Scalars(
        divisor, factor, beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**t, 1 - beta2**t, eps, 1 - lr * decay, lr,
    )


_STORED = (attrgetter("p"), attrgetter("m"), attrgetter("v"))


def _update(bucket: list[_Piece], divisor: float, factor: float) -> None:
    group, t = bucket[0][0].group, bucket[0][0].state["step"]
    lr, decay, eps, beta1, beta2 = _hyper(group)
    g = _gradient(_gathered(bucket, attrgetter("raw")), divisor).double()
    if factor != 1:
        g.mul_(factor)
    p, m, v = (_gathered(bucket, of).double() for of in _STORED)
    # Single operations, no fused multiply-add: each is correctly rounded wherever a vector loop ends.
    m.mul_(beta1).add_(g.mul(1 - beta1))
    v.mul_(beta2).add_(g.mul_(g).mul_(1 - beta2))
    denominator = v.div(1 - beta2**t).sqrt_().add_(eps)
    p.mul_(1 - lr * decay).sub_(m.div(1 - beta1**t).div_(denominator).mul_(lr))
    sizes = [piece.stop - piece.start for _, piece in bucket]
    for values, of in zip((p, m, v), _STORED, strict=True):
        torch._foreach_copy_([of(e)[piece] for e, piece in bucket], list(values.float().split(sizes)))
