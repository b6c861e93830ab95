"""Programs of Triton's interpreter in a shuffled order: each runs once, sound kernels do not notice, faulty ones do."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.interpreter


def results(seed: int | None):
    from verify.mutants import kernels
    from verify.shuffle import shuffled_programs
    from verify.strategies import LinearCase
    from verify.subjects import FastloraLinear

    case = LinearCase(m=150, k=40, n=20, r=4, dtype="fp32", alpha=8.0, rslora=False, bias=False, dropout=0.0, values="normal",
                      size=1.0, layout="plain", seed=3)  # fmt: skip
    inputs, part = case.inputs(), FastloraLinear("cpu", (torch.float32,), forced="triton")
    if seed is None:
        sound = part.run(inputs, "exact")
        return sound, kernels.float_atomics(inputs, sound, 1.0)
    with shuffled_programs(seed):
        sound = part.run(inputs, "exact")
        return sound, kernels.float_atomics(inputs, sound, 1.0)


def test_shuffled_programs_leave_sound_kernels_alone_and_show_float_atomics():
    sound, atomics = results(None)
    apart = 0
    for seed in (1, 2, 3):
        other, shuffled = results(seed)
        for name in ("y", "dx", "da", "db"):
            assert torch.equal(getattr(sound, name), getattr(other, name)), name
        apart += not torch.equal(atomics, shuffled)
    assert apart
    # The same sums but for their order: gamma_n of fp32 over 150 products of unit size.
    assert float((atomics - sound.da).abs().max()) < 150 * 2.0**-24 * float(sound.da.abs().max() + 150)


def test_shuffled_programs_run_every_program_once():
    import triton
    import triton.language as tl

    from verify.shuffle import shuffled_programs

    @triton.jit
    def count(p_order, p_next, SIZE: tl.constexpr):
        place = tl.atomic_add(p_next, 1)
        tl.store(p_order + (tl.program_id(0) * SIZE + tl.program_id(1)), place)

    order, turn = torch.full((3, 4), -1), torch.zeros(1, dtype=torch.int64)
    with shuffled_programs(5):
        count[(3, 4)](order, turn, SIZE=4)
    assert sorted(order.flatten().tolist()) == list(range(12))
    assert order.flatten().tolist() != list(range(12))
