"""AdamW against a float64 oracle and torch's own in float64; exact sums, clipping, threads, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lora_standin import StandInModel
from torch import nn
from transformers import get_scheduler

import fastlora.optim
from fastlora.errors import InputError, TrainingError
from fastlora.exact import exact
from fastlora.optim import AdamW

HALF_ULP = 2.0**-24  # fp32: a rounded value is within this share of the exact one
TINY = 2.0**-150  # half the spacing of fp32's subnormals, where the share means nothing
DOUBLE = 2.0**-48  # room for the few roundings of a float64 evaluation, 32 of 2**-53


def rounding(x: torch.Tensor) -> torch.Tensor:
    return x.abs() * HALF_ULP + TINY


class Weights(nn.Module):
    """Plain trainable tensors: several cut across the optimiser's blocks."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g)))


SHAPES = {"a": (3, 5), "b": (257,), "c": (210, 200)}


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    scales = [10.0 ** -(i + step % 3) for i in range(len(list(model.parameters())))]
    return [torch.randn(p.shape, generator=g) * s for p, s in zip(model.parameters(), scales)]


def set_gradients(model: nn.Module, step: int) -> None:
    for p, g in zip(model.parameters(), gradients(model, step)):
        p.grad = g.clone()


@pytest.mark.parametrize("decay, max_norm", [(0.0, None), (0.01, None), (0.1, 0.5)])
def test_step_is_within_one_rounding_of_a_float64_oracle(decay: float, max_norm: float | None) -> None:
    """The oracle gets the stored fp32 state of before each step, so a step may add one rounding only."""
    model = Weights(SHAPES)
    lr, beta1, beta2, eps = 2e-3, 0.9, 0.999, 1e-8
    optimizer = AdamW(model, lr=lr, weight_decay=decay, max_grad_norm=max_norm)
    m = [torch.zeros_like(p).double() for p in model.parameters()]
    v = [torch.zeros_like(p).double() for p in model.parameters()]
    for t in range(1, 5):
        before = [p.detach().double() for p in model.parameters()]
        set_gradients(model, t)
        report = optimizer.step()
        flat = [x for g in gradients(model, t) for x in g.double().flatten().tolist()]
        norm = math.sqrt(math.fsum(x * x for x in flat))
        assert abs(report.grad_norm - norm) <= norm * DOUBLE
        assert report.clipped == (max_norm is not None and norm > max_norm)
        factor = max_norm / norm if report.clipped else 1.0
        for i, (p, g) in enumerate(zip(model.parameters(), gradients(model, t))):
            g = g.double() * factor
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            update = lr * (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            want = before[i] * (1 - lr * decay) - update
            state = optimizer.state[p]
            # m may cancel between its two terms, each of which carries the float64 error
            slack = (m[i].abs() + 2 * g.abs()) * DOUBLE
            moved = slack / (1 - beta1**t) * lr / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            bound = rounding(want) + (before[i].abs() + update.abs()) * DOUBLE + moved
            assert ((p.detach().double() - want).abs() <= bound).all()
            assert ((state["exp_avg"].double() - m[i]).abs() <= rounding(m[i]) + slack).all()
            assert ((state["exp_avg_sq"].double() - v[i]).abs() <= rounding(v[i]) + v[i] * DOUBLE).all()
            m[i], v[i] = state["exp_avg"].double(), state["exp_avg_sq"].double()


def test_step_stays_within_accumulated_roundings_of_torch_in_float64() -> None:
    """Bound: every stored value takes one fp32 rounding a step; they are carried through the recurrences."""
    model = Weights(SHAPES)
    twin = copy.deepcopy(model).double()
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.99, 1e-8, 0.05
    mine = AdamW(model, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    theirs = torch.optim.AdamW(twin.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    errors = [[torch.zeros_like(p) for p in twin.parameters()] for _ in range(3)]  # of m, v, p
    for t in range(1, 9):
        set_gradients(model, t)
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = p.grad.double()
        mine.step()
        theirs.step()
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters())):
            em, ev, ep = (e[i] for e in errors)
            m, v = theirs.state[q]["exp_avg"], theirs.state[q]["exp_avg_sq"]
            em, ev = beta1 * em, beta2 * ev  # what the stored values of the step before carry in
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            low = (v_hat - ev / (1 - beta2**t)).clamp(min=0).sqrt()
            root = v_hat.sqrt() - low  # how far the square root can have moved (down is the farther way)
            least = low + eps
            update = em / (1 - beta1**t) / least + m_hat.abs() * root / (least * (v_hat.sqrt() + eps))
            ep = ep + lr * update + rounding(q.detach().abs() + ep + lr * update) + q.detach().abs() * DOUBLE
            assert ((p.detach().double() - q.detach()).abs() <= ep).all()
            # then m and v are stored
            em, ev = em + rounding(m.abs() + em), ev + rounding(v + ev)
            for e, value in zip(errors, (em, ev, ep)):
                e[i] = value


def test_small_decay_keeps_its_digits() -> None:
    """1 - 2e-6 in fp32 would be off by 1.4 % of the decay; at 1024.0 that is seen after one step."""
    model = Weights({"a": (1,)})
    model.a.data.fill_(1024.0)
    optimizer = AdamW(model, lr=2e-4, weight_decay=0.01)
    model.a.grad = torch.zeros(1)
    optimizer.step()
    assert model.a.item() == torch.tensor(1024.0 * (1 - 2e-6), dtype=torch.float64).float().item()


@pytest.mark.parametrize("threads", [2, 4])
def test_step_bits_do_not_depend_on_threads(threads: int) -> None:
    def run(count: int) -> tuple[list[float], list[torch.Tensor]]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            model = Weights({"a": (257, 300), "b": (7,), "c": (9, 14001)})
            optimizer = AdamW(model, weight_decay=0.1, max_grad_norm=1.0)
            norms = []
            for t in range(3):
                set_gradients(model, t)
                norms.append(optimizer.step().grad_norm)
            state = [x for p in model.parameters() for x in optimizer.state[p].values() if torch.is_tensor(x)]
            return norms, [p.detach() for p in model.parameters()] + state
        finally:
            torch.set_num_threads(before)

    one, many = run(1), run(threads)
    assert one[0] == many[0]
    assert all(torch.equal(x, y) for x, y in zip(one[1], many[1], strict=True))


def test_step_bits_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (2**12, 2**15):
        monkeypatch.setattr(fastlora.optim, "BLOCK", {"cpu": block})
        model = Weights(SHAPES)
        optimizer = AdamW(model, weight_decay=0.1)
        set_gradients(model, 0)
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


X = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))


def exact_run(cuts: list[list[int]], **options: object) -> tuple[StandInModel, list]:
    model = StandInModel().fill_b()
    optimizer = AdamW(model, **options)
    reports = []
    for _ in range(2):
        with exact(model):
            for rows in cuts:
                for row in rows:  # a chunk is one row here, however rows are cut into micro-batches
                    (model(X[row : row + 1]) ** 2).sum().backward()
        reports.append(optimizer.step(supervised_tokens=8))
    return model, reports


def test_exact_step_has_the_same_bits_for_every_order() -> None:
    one, first = exact_run([list(range(8))], max_grad_norm=1.0)
    two, second = exact_run([[7, 2], [5, 0, 1], [6, 3, 4]], max_grad_norm=1.0)
    assert first == second
    assert first[0].clipped
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_exact_step_uses_the_sum_divided_once_and_is_consumed() -> None:
    model = StandInModel().fill_b()
    optimizer = AdamW(model)
    with exact(model):
        model(X).sum().backward()
    units = [s.total.clone() for m in (model.q_proj, model.v_proj) for s in m.sums]
    report = optimizer.step(supervised_tokens=5)
    g = [(u.double() * 2.0**-40 / 5).float().double() for u in units]
    norm = math.sqrt(math.fsum(x * x for t in g for x in t.flatten().tolist()))
    assert abs(report.grad_norm - norm) <= norm * DOUBLE
    for p, want in zip((p for p in model.parameters() if p.requires_grad), g, strict=True):
        m = optimizer.state[p]["exp_avg"].double()
        assert ((m - want * (1 - 0.9)).abs() <= rounding(want) + want.abs() * DOUBLE).all()
    with pytest.raises(InputError, match="nothing to step on"):
        optimizer.step()


def test_gradient_scale_cancels_exactly() -> None:
    def run(scale: float, tokens: int | None, use_exact: bool) -> list[torch.Tensor]:
        model = StandInModel().fill_b()
        optimizer = AdamW(model, gradient_scale=scale)
        if use_exact:
            with exact(model):
                (model(torch.ones(1, 12)) * scale).sum().backward()
        else:
            (model(torch.ones(1, 12)) * scale).sum().backward()
        optimizer.step(supervised_tokens=tokens)
        return [p.detach() for p in model.parameters()]

    # Powers of two move no bit of a float gradient; fixed point holds more of the scaled one.
    assert all(torch.equal(x, y) for x, y in zip(run(1.0, 3, False), run(1024.0, 3, False)))
    for x, y in zip(run(1.0, 3, False), run(1024.0, 3, True)):
        # a unit of 2**-40 / 1024 on gradients of order 1 is below their fp32 rounding
        assert torch.equal(x, y)


def test_step_refuses_bad_use() -> None:
    model = StandInModel().fill_b()
    optimizer = AdamW(model)
    with pytest.raises(InputError, match="nothing to step on"):
        optimizer.step()
    with exact(model):
        model(X).sum().backward()
        with pytest.raises(InputError, match="after the block"):
            optimizer.step(supervised_tokens=1)
    for tokens in (None, 0, -1, float("nan")):
        with pytest.raises(InputError, match="supervised_tokens: got"):
            optimizer.step(supervised_tokens=tokens)
    model.q_proj.lora_A.weight.grad = torch.zeros(3, 12)
    with pytest.raises(InputError, match="q_proj.lora_A.weight: got a .grad beside exact sums"):
        optimizer.step(supervised_tokens=1)


def test_exact_step_refuses_other_trainable_parameters() -> None:
    model = StandInModel()
    model.norm.weight.requires_grad_(True)
    optimizer = AdamW(model)
    with exact(model):
        model(X).sum().backward()
    with pytest.raises(InputError, match="norm.weight: trainable"):
        optimizer.step(supervised_tokens=1)


@pytest.mark.parametrize("use_exact", [True, False])
def test_non_finite_gradient_changes_nothing_and_names_the_parameter(use_exact: bool) -> None:
    model = StandInModel().fill_b()
    optimizer = AdamW(model)
    before = [p.detach().clone() for p in model.parameters()]
    bad = X.clone()
    bad[0, 0] = float("nan")
    if use_exact:
        with exact(model):
            model(bad).sum().backward()
    else:
        model(bad).sum().backward()
    with pytest.raises(TrainingError, match=r"q_proj\.lora_A\.weight: the gradient is NaN"):
        optimizer.step(supervised_tokens=1)
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    assert not any(s.pending for m in (model.q_proj, model.v_proj) for s in m.sums or ())


def test_underflow_shares_are_kept_after_the_step() -> None:
    model = StandInModel()
    optimizer = AdamW(model)
    with exact(model):
        (model(X) * 1e-13).sum().backward()
    optimizer.step(supervised_tokens=1)
    shares = optimizer.underflow_shares()
    assert shares["q_proj.lora_B.weight"] == 1.0
    assert shares["q_proj.lora_A.weight"] == 0.0  # B = 0: every partial of A is exactly 0


def test_closure_runs_with_gradients() -> None:
    model = StandInModel().fill_b()
    optimizer = AdamW(model)

    def closure() -> None:
        with exact(model):
            model(X).sum().backward()

    assert optimizer.step(closure, supervised_tokens=8).grad_norm > 0


def test_state_dict_round_trip_continues_with_the_same_bits() -> None:
    def steps(model: nn.Module, optimizer: AdamW, which: range) -> None:
        for t in which:
            set_gradients(model, t)
            optimizer.step()

    straight = Weights(SHAPES)
    optimizer = AdamW(straight, weight_decay=0.1)
    steps(straight, optimizer, range(2))
    resumed = copy.deepcopy(straight)
    other = AdamW(resumed, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(straight, optimizer, range(2, 4))
    steps(resumed, other, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert other.state[resumed.a]["step"] == 4


@pytest.mark.parametrize("shapes", [{"a": (3, 5), "z": (257,), "c": (210, 200)}, {**SHAPES, "a": (5, 3)}])
def test_load_state_dict_refuses_other_parameters(shapes: dict) -> None:
    model = Weights(SHAPES)
    optimizer = AdamW(model)
    set_gradients(model, 0)
    optimizer.step()
    with pytest.raises(InputError, match="state_dict: "):
        AdamW(Weights(shapes)).load_state_dict(optimizer.state_dict())


def test_transformers_scheduler_drives_the_rate() -> None:
    model = StandInModel().fill_b()
    optimizer = AdamW(model, lr=1e-2)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=4)
    rates, moved = [], []
    for _ in range(4):
        before = model.q_proj.lora_A.weight.detach().clone()
        with exact(model):
            model(X).sum().backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(supervised_tokens=8)
        scheduler.step()
        moved.append(not torch.equal(before, model.q_proj.lora_A.weight))
    assert rates == [0.0, 0.005, 0.01, 0.005]
    assert moved == [False, True, True, True]


@pytest.mark.parametrize(
    "options, name",
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"gradient_scale": 3.0}, "gradient_scale"),
        ({"gradient_scale": 0.0}, "gradient_scale"),
    ],
)
def test_arguments_are_validated(options: dict, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: got .*allowed is"):
        AdamW(StandInModel(), **options)


def test_parameters_must_be_fp32() -> None:
    with pytest.raises(InputError, match=r"lora_A\.weight: got torch\.bfloat16"):
        AdamW(StandInModel().bfloat16())
    with pytest.raises(InputError, match="without trainable"):
        AdamW(nn.Module())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_exact_steps_on_cuda_repeat_and_agree_with_the_cpu() -> None:
    def run(device: str) -> tuple[list[float], list[torch.Tensor]]:
        model = Weights({"a": (257, 300), "b": (7,), "c": (9, 14001)}).to(device)
        optimizer = AdamW(model, weight_decay=0.1, max_grad_norm=1.0)
        norms = []
        for t in range(3):
            for p, g in zip(model.parameters(), gradients(model, t)):
                p.grad = g.to(device)
            norms.append(optimizer.step(supervised_tokens=3).grad_norm)
        return norms, [p.detach().cpu() for p in model.parameters()]

    one, two, cpu = run("cuda"), run("cuda"), run("cpu")
    assert one[0] == two[0]
    assert all(torch.equal(x, y) for x, y in zip(one[1], two[1], strict=True))
    assert all(abs(x - y) <= y * DOUBLE for x, y in zip(one[0], cpu[0], strict=True))
    for x, y in zip(one[1], cpu[1], strict=True):
        # float64 differs in its last bits only, so each of three steps may round to the neighbour
        assert ((x - y).abs().double() <= 3 * 2 * rounding(y.double())).all()
