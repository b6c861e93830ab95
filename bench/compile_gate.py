"""Compile every kernel for every architecture without a GPU; report registers, spills, shared memory and instructions.

``python -m bench gate`` prints the table of all cases; tests/compile holds a chosen few against the limits. Compiling
only reports shared memory, so it is compared with the architecture's own limit here: a kernel that passes the compiler may
still be one that cannot launch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import gate_attention, gate_flat, gate_rows, gate_specialized, gate_table
from fastlora.kernels import gemm as gemm_file
from fastlora.kernels import project as project_file
from fastlora.kernels import tables
from fastlora.kernels import token_sum as token_sum_file
from fastlora.kernels.chunks import UNIT
from fastlora.kernels.columns import Columns, starts_and_widths

_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel build: operation, architecture, dtype, padded rank, shape [N, K] and variants."""

    operation: str
    arch: str
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    outer: int = 4096
    inner: int = 4096
    dropout: bool = False
    exact: bool = True
    transposed: bool = True
    count: int = 1  # projections of one input, side by side

    @property
    def name(self) -> str:
        """A label for tables and test ids."""
        drop, mode = "-dropout" if self.dropout else "", "-exact" if self.exact else ""
        drop += "" if self.count == 1 else f"-{self.count}together"
        side = "" if not self.operation.startswith("gemm") else "-forward" if self.transposed else "-dx"
        mode = mode if self.operation in ("da", "db", "db_ds", "adamw", "squares") else ""
        return f"{self.operation}{side}-{self.arch}-{_TYPE[self.dtype]}-r{self.rank}-{self.outer}x{self.inner}{drop}{mode}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Bytes for shared memory; counts of 32-bit registers a thread."""

    registers: int
    spills: int
    shared: int
    wgmma: int
    tma: int


def _target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _ranges(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(starts, widths) of the projections' output features: equal parts."""
    width = case.outer // case.count
    return tuple(i * width for i in range(case.count)), (width,) * case.count


def build_arguments(case: Case):
    """(kernel, tile, signature by argument name, constants by argument name) as the library launches it."""
    element = "*" + _TYPE[case.dtype]
    drop = gate_flat.DRAWS | {"keep_scale": "fp32"}
    layout = Columns((case.rank,) * case.count, *_ranges(case), (1.0,) * case.count)
    precision = "ieee" if case.dtype == torch.float32 else "tf32"
    if case.operation in gate_attention.OPERATIONS:
        return gate_attention.build_arguments(case, element)
    if case.operation in gate_flat.OPERATIONS:
        return gate_flat.build_arguments(case, element)
    if case.operation in gate_specialized.OPERATIONS:
        return gate_specialized.build_arguments(case, element, layout)
    if case.operation in gate_rows.OPERATIONS:
        return gate_rows.build_arguments(case, element)
    if case.operation in ("project", "ds"):
        apart = case.operation == "ds"
        columns = layout.padded if case.dropout or apart else min(layout.columns, 256)
        starts, widths = starts_and_widths(layout.ranges if apart else ((0, case.inner),))
        tile = tables.project_tile(case.arch, case.dtype, columns, apart=apart)
        signature = {"p_x": element, "p_w": element, "p_s": element, "p_scale": "*fp32", "M": "i32"} | drop
        constants = dict(
            LD=case.outer if apart else case.inner, LR=layout.columns, W_R=1 if apart else case.inner, W_F=layout.columns if apart else 1,
            START0=starts[0], START1=starts[1], START2=starts[2], F0=widths[0], F1=widths[1], F2=widths[2],
            FIRST=0, USED=layout.columns, DROPOUT=case.dropout, PRECISION=precision, BM=tile.bm, BF=tile.bk, C=columns,
        )  # fmt: skip
        return project_file.project_kernel, tile, signature, constants
    if case.operation in ("da", "db", "db_ds"):
        with_ds, major = case.operation == "db_ds", case.operation != "da"
        together = not major and (case.count == 1 or not case.dropout and layout.columns <= token_sum_file.MOST_COLUMNS)
        per, columns = (case.count, layout.columns) if together else (1, layout.padded)
        features = case.outer if major else case.inner
        apart = not major and not together
        tile = tables.token_sum_tile(case.arch, case.dtype, columns, with_ds=with_ds, features=features, apart=apart)
        signature = {"p_wide": element, "p_narrow": element, "p_out": "*i64" if case.exact else "*fp32"}
        signature |= {"p_stats": "*i64" if case.exact else element, "p_b": element}
        signature |= {"p_ds": "*fp32" if with_ds else element, "p_table": "*i32", "p_ends": "*i8"}
        signature |= {"M": "i32", "units": "i32", "runs": "i32", "first_chunk": "i64"} | drop
        starts, widths = starts_and_widths(layout.ranges if major else ((0, features),))
        constants = dict(
            LD=features, LR=layout.columns, B_LD=layout.columns, R=layout.padded, RANK=case.rank, PER=per, C=columns,
            START0=starts[0], START1=starts[1], START2=starts[2], F0=widths[0], F1=widths[1], F2=widths[2],
            OUT_F=case.rank if major else 1, OUT_R=1 if major else features, OUT_SIZE=features * case.rank * case.count,
            EXACT=case.exact, WITH_DS=with_ds, DROPOUT=case.dropout, PRECISION=precision, UNIT=UNIT,
            BM=tile.bm, BF=tile.bn,
        )  # fmt: skip
        return token_sum_file.token_sum_kernel, tile, signature, constants
    n, k = (case.outer, case.inner) if case.transposed else (case.inner, case.outer)
    from fastlora.kernels.launch import can_use_tma, is_ragged

    tma = can_use_tma(case.arch, case.dtype, k, n)
    ragged = is_ragged(case.dtype, n, k)
    tile = tables.gemm_tile(case.arch, case.dtype, dropout=case.dropout, tma=tma, ragged=ragged)
    used = layout.padded * case.count if case.dropout else layout.columns
    low = min(layout.padded if case.dropout else used, tile.bk)
    constants = dict(
        N=n, K=k, R=used, COUNT=case.count if case.dropout else 1, TRANSPOSED=case.transposed, BIAS=False, DROPOUT=case.dropout,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BR=low, GROUP=tile.group,
    )  # fmt: skip
    if not tma:
        signature = dict.fromkeys(("p_x", "p_w", "p_s", "p_b", "p_bias", "p_y"), element)
        signature |= {"M": "i32"} | drop
        return gemm_file.gemm_kernel, tile, signature, constants | {"PRECISION": precision, "LR": layout.columns}

    def blocks(rows, columns):
        return f"tensordesc<{_TYPE[case.dtype]}[{rows}, {columns}]>"

    def across(width, depth):
        return blocks(width, depth) if case.transposed else blocks(depth, width)

    store = gemm_file.stored_columns(tile, case.dropout)
    signature = {"d_x": blocks(tile.bm, tile.bk), "d_w": across(tile.bn, tile.bk), "d_s": blocks(tile.bm, low)}
    signature |= {"d_b": across(store if case.dropout else tile.bn, low), "p_bias": element, "d_y": blocks(tile.bm, store)}
    signature |= {"M": "i32"} | drop
    constants |= dict(HALVES=tile.halves, FLATTEN=tile.flatten)
    return gemm_file.gemm_tma_kernel, tile, signature, constants


# Bytes of registers that a case may keep in local memory, where measured to be faster than a tile that keeps none.
SPILLS_ALLOWED = {
    # with Triton 3.6 alone: see MASKS_APART
    ("attention_dkv", "sm_90", 128): 88 if gate_attention.file.MASKS_APART else 0,
    # addresses, read before and after the walk: dK and dV leave no register free (bytes with Triton 3.6: 32, measured at 0.59 ms for 32 heads
    # of 128 and 8,192 tokens, H200; 3.8: 40; 3.9, which holds addresses in each thread: 192, some read in the walk)
    ("attention_dkv_specialized", "sm_90", 128): 192,
    # with Triton 3.8 alone, once a tile, after its product: it computes the exponentials of both parts at once
    **dict.fromkeys([(f"gemm_glu_{act}", "sm_90", 14336) for act in ("silu", "gelu_tanh")], 72 if triton.__version__.startswith("3.8.") else 0),
    # with Triton 3.9 alone, outside every loop: numbers of the thread, stored when the kernel starts and read when its part begins
    **dict.fromkeys([(op, "sm_90", outer) for op in gate_specialized.DROPOUT for outer in (4096, 6144)], 24 if triton.__version__.startswith("3.9.") else 0),
}


def allowed_spills(case: Case) -> int:
    """Bytes this case may spill; 0 for nearly all."""
    return SPILLS_ALLOWED.get((case.operation, case.arch, case.outer), 0)


def compile_case(case: Case):
    """(compiled kernel, its :class:`Report`)."""
    kernel, tile, signature, constants = build_arguments(case)
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")
    }
    source = _source_of(kernel)(kernel, full, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": tile.fusion}
    compiled = triton.compile(source, target=_target(case.arch), options=options)
    return compiled, _report(compiled, case.arch)


def _source_of(kernel) -> type:
    """What the compiler takes a kernel as: Gluon's own source, or Triton's."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def _report(compiled, arch: str) -> Report:
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))
        return Report(registers, spills, shared, 0, 0)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    # STACK holds what a thread keeps in local memory: spilled registers (no kernel here has arrays of its own).
    spills = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return Report(registers, spills, shared, ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"))


def all_cases() -> list[Case]:
    """Every case that the gate knows."""
    cases = []
    for arch in tables.ARCHITECTURES:
        for rank in (16, 64, 256):
            cases += [Case("gemm", arch, rank=rank), Case("gemm", arch, rank=rank, transposed=False)]
            cases += [Case(op, arch, rank=rank) for op in ("project", "da", "db" if rank > 32 else "db_ds")]
        cases += [Case("db_ds", arch, outer=28672, count=2), Case("da", arch, inner=14336), Case("da", arch, rank=64, inner=14336)]
        cases += [Case("db_ds", arch, rank=32), Case("db", arch, rank=128), Case("da", arch, rank=128)]
        cases += [Case("gemm", arch, transposed=False, dropout=True), Case("project", arch, dropout=True)]
        cases += [Case("da", arch, dropout=True), Case("db_ds", arch, exact=False), Case("da", arch, exact=False)]
        cases += [Case(op, arch, torch.float32) for op in ("gemm", "project", "da", "db_ds")]
        cases += [Case("gemm", arch, rank=rank, inner=inner) for rank in (32, 64) for inner in (16, 64, 128)]
        cases += [Case(op, arch, rank=rank, outer=6144, count=3) for rank in (16, 64) for op in ("project", "da")]
        cases += [Case("ds", arch, rank=64, outer=6144, count=3), Case("db_ds", arch, outer=6144, count=3), Case("da", arch, rank=16, count=2)]
        cases += [Case("gemm", arch, outer=6144, count=3), Case("gemm", arch, outer=6144, count=3, transposed=False)]
        cases += [Case("gemm", arch, outer=6144, count=3, transposed=False, dropout=True)]
        cases += [Case("gemm", arch, outer=257, inner=129), Case("gemm", arch, torch.float16)]
        cases += [Case(op, arch, torch.float32, outer=0, inner=0, exact=exact) for op in gate_flat.OPTIMISER for exact in (True, False)]
        cases += [Case("masks", arch, dropout=True), Case("factors", arch), Case("factors", arch, rank=20, outer=576)]
        for head in (64, 128, 256)[: 2 if tables.ATTENTION_MAX_HEAD[arch] == 128 else 3]:
            cases += [Case(op, arch, outer=head, inner=0) for op in gate_attention.OPERATIONS]
    return cases + gate_rows.all_cases(Case) + gate_specialized.all_cases(Case)


def main(update: bool = False) -> None:
    """Print all cases; exit 1 if one spills, needs more shared memory than its architecture has, or differs from the committed table.

    ``update`` writes the table of this Triton version instead of comparing with it.
    """
    table = None if update else gate_table.load(triton.__version__)
    if table is None and not update:
        print(f"no table for Triton {triton.__version__}: holding the architectures' limits alone")
    reports, bad = {}, 0
    for case in all_cases():
        try:
            _, report = compile_case(case)
        except Exception as error:  # the table should show every case
            print(f"{case.name:60s} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            bad += 1
            continue
        reports[case.name] = report
        limit, differs = tables.SHARED_MEMORY[case.arch], gate_table.difference(case.name, report, table)
        fits = report.shared <= limit and report.spills <= allowed_spills(case)
        bad += not fits or bool(differs)
        print(f"{case.name:60s} {'ok' if fits else 'BAD':4s} {report} of {limit}", flush=True)
        if differs:
            print(f"  differs from the table: {differs}", flush=True)
    if update and not bad:
        print(f"written: {gate_table.write(triton.__version__, reports)}")
    raise SystemExit(1 if bad else 0)
