"""A chosen set of kernels compiled with no GPU: they must fit, spill nothing and use the instructions they were written for."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import triton

from bench import gate_attention, gate_rows, gate_specialized, gate_table
from bench.compile_gate import Case, all_cases, allowed_spills, compile_case
from fastlora.kernels import tables
from fastlora.kernels.launch import TMA_MIN_INNER

# Two dozen of the full set (`nox -s bench -- gate`): every architecture's default rank in both directions, and on the most
# common data-centre and consumer cards the sums, the edges and dropout too.
CHOSEN = [Case("gemm", arch, transposed=side) for arch in tables.ARCHITECTURES for side in (True, False)]
CHOSEN += [
    Case(operation, arch, rank=rank)
    for arch in ("sm_89", "sm_90")
    for operation, rank in (("project", 16), ("db_ds", 16), ("da", 16), ("db", 128), ("da", 256))
]
CHOSEN += [
    Case("gemm", "sm_90", transposed=False, dropout=True), Case("da", "sm_90", dropout=True),
    Case("gemm", "sm_90", outer=257, inner=129), Case("gemm", "sm_86", torch.float32),
    # one and two steps of K: found on a GPU, the first asked for more shared memory than there is
    Case("gemm", "sm_90", rank=32, inner=16), Case("gemm", "sm_90", rank=64, inner=128),
    Case("db_ds", "sm_90", exact=False),
]  # fmt: skip
CHOSEN += [
    Case(operation, arch, outer=head, inner=0)
    for operation in gate_attention.OPERATIONS
    for arch, head in (("sm_90", 64), ("sm_90", 128), ("sm_89", 64))
]
# The row-wise kernels, at the widths of an 8B model.
ROWS = [
    Case(operation, "sm_90", outer=outer, inner=inner)
    for operation, outer, inner in (
        ("norm_forward", 4096, 0), ("norm_backward", 4096, 0), ("rope", 128, 40), ("head_norm_forward", 128, 40),
        ("head_norm_backward", 128, 40), ("glu_forward_silu", 14336, 0), ("glu_backward_silu", 14336, 0),
    )
]  # fmt: skip
CHOSEN += [Case("db_ds", "sm_89", outer=6144, count=3)]
CHOSEN += [Case("factors", "sm_90", rank=20, outer=576), Case("project_dropout", "sm_90", outer=6144, count=3, dropout=True)]
CHOSEN += [Case("gemm_specialized", "sm_90", transposed=side) for side in (True, False)] + [Case("gemm_sums", "sm_90", rank=64, outer=6144, count=3, transposed=False)]
CHOSEN += [Case("gemm_glu_silu", "sm_90", outer=14336, transposed=side) for side in (True, False)]
CHOSEN += [Case(min(gate_specialized.GEMM, key=lambda name: gate_specialized.GEMM[name].bn), "sm_90")]
CHOSEN += [Case(operation, "sm_90", outer=128, inner=0) for operation in gate_specialized.ATTENTION]
CHOSEN += [*ROWS, Case("norm_backward", "sm_89", torch.float32, outer=16384, inner=0)]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_kernel_fits_and_does_not_spill(case):
    _, report = compile_case(case)
    assert report.spills <= allowed_spills(case), f"{report.spills} bytes of registers spilled"
    assert report.shared <= tables.SHARED_MEMORY[case.arch], f"{report.shared} bytes of shared memory"
    differs = gate_table.difference(case.name, report, gate_table.load(triton.__version__))
    assert not differs, f"{differs} (python -m bench gate --update accepts it)"
    if case.arch == "sm_90" and case.operation.startswith("gemm") and case.dtype != torch.float32:
        assert report.wgmma > 0, "no warp-group matrix instruction"
        if case.inner % 8 == 0 and case.inner >= TMA_MIN_INNER:
            assert report.tma > 0, "no bulk tensor copy"
    if case.operation in gate_specialized.ATTENTION:
        assert report.wgmma > 0 and report.tma > 0, "no warp-group matrix instruction, or no bulk tensor copy"


def test_a_planted_spill_fails_the_gate(monkeypatch):
    case = Case("project", "sm_90", rank=64)
    plain, (_, report) = tables.project_tile, compile_case(case)
    monkeypatch.setattr(tables, "project_tile", lambda *a, **k: plain(*a, **k)._replace(warps=1))
    with pytest.raises(AssertionError, match=r"[1-9]\d* bytes of registers spilled"):
        test_kernel_fits_and_does_not_spill(case)
    # were so many allowed, it would still not be the table's figure
    monkeypatch.setattr("bench.compile_gate.SPILLS_ALLOWED", {("project", "sm_90", case.outer): 2**20})
    monkeypatch.setattr(gate_table, "load", lambda version: {case.name: dataclasses.asdict(report)})
    with pytest.raises(AssertionError, match=r"spills 0 -> [1-9]\d*.*gate --update accepts it"):
        test_kernel_fits_and_does_not_spill(case)


@pytest.mark.parametrize("operation", ["da", "db_ds", "project"])
def test_a_step_waits_for_its_own_copies_alone(operation):
    # a word read in the loop would be copied asynchronously too, and its wait drains the pipeline at every step
    compiled, _ = compile_case(Case(operation, "sm_90"))
    waits = re.findall(r"async_wait.*num = (\d+)", compiled.asm["ttgir"])
    assert len(waits) == 2 and int(waits[0]) > 0 and int(waits[1]) == 0, waits


@pytest.mark.parametrize("operation", gate_specialized.OPERATIONS)
def test_the_specialised_kernels_move_registers_to_the_warps_that_multiply(operation):
    case = Case(operation, "sm_90", outer=128, inner=0) if operation in gate_specialized.ATTENTION else Case(operation, "sm_90")
    compiled, _ = compile_case(case)
    given = set(re.findall(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32\s+(\d+)", compiled.asm["ptx"]))
    # where the loading warp looks up pieces of sums it keeps more; of S under dropout warpgroups that mask have what the one that multiplies leaves
    told = dict.fromkeys(gate_specialized.SUMS, ("232", "40")) | {gate_specialized.S_DROPPED: ("128", "88")}
    assert set(told.get(operation, ("240", "24"))) <= given


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_row_kernel_loads_16_bytes_at_a_time(case):
    compiled, _ = compile_case(case)
    assert gate_rows.loads_16_bytes(compiled.asm["ptx"])


def test_chosen_cases_are_few_and_known():
    assert len(CHOSEN) <= 60
    assert {case.arch for case in CHOSEN} == set(tables.ARCHITECTURES)
    assert len(all_cases()) > len(CHOSEN)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_copies_of_a_and_b_round_to_nearest(arch):
    compiled, _ = compile_case(Case("factors", arch))
    assert "cvt.rn.bf16" in compiled.asm["ptx"]
