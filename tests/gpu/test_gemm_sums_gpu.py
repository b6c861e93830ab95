"""Sums over tokens in the product's launch are those of kernels of their own, to the bit, whoever takes which piece."""

from __future__ import annotations

import pytest
import torch

from fastlora.kernels import gemm_sums, project_beside
from fastlora.kernels.chunks import chunks_of
from fastlora.kernels.gemm import gemm
from fastlora.kernels.project import project
from fastlora.kernels.sums_beside import Sums
from fastlora.kernels.token_sum import Sink, sum_a
from fastlora.ops import triton_path
from fastlora.ops.triton_path import low_rank_gradients
from fastlora.token_sum import TokenSum
from tests import split_cases as cases
from tests.gpu.test_gemm_beside_gpu import QKV, inputs
from tests.gpu_marks import HOPPER
from tests.models import tiny_model

pytestmark = HOPPER

FOUR = tuple((start, start + 2048) for start in range(0, 8192, 2048))
RAGGED = ((0, 1000), (1024, 1100), (1152, 5000), (5056, 5100), (5120, 8192))
# Tokens, output features of each projection, rank, documents (None: rows without any).
SHAPES = [
    (8192, QKV, 16, FOUR), (8192, QKV, 16, RAGGED), (8192, QKV, 16, None), (8192, QKV, 64, FOUR), (8192, QKV, 32, RAGGED), (8192, QKV, 5, RAGGED),
    (8192, (4096,), 64, RAGGED), (2048, (4096,), 16, None), (8132, (4096,), 16, None), (8192, (14336, 14336), 16, FOUR),
]  # fmt: skip


def sink(count: int, *shape: int) -> Sink:
    """Sums of ``count`` projections; chunks are counted by views of none of their rows."""
    total, stats = torch.zeros(*shape, dtype=torch.int64, device="cuda"), torch.zeros(count, 4, dtype=torch.int64, device="cuda")
    return Sink(total, stats, tuple(TokenSum.over(total[:0], stats[i]) for i in range(count)))


def case(shape, dtype):
    """(inputs as of the other file, rank columns of S, chunks, a maker of empty (sums of dB, sums of dA))."""
    rows, widths, rank, spans = shape
    x, dy, weight, a, b, layout = inputs((rows, 4096, widths, rank, None), dtype)

    def sinks():
        return sink(len(widths), sum(widths), rank), sink(len(widths), len(widths) * rank, 4096)

    return x, dy, weight, a, b, layout, project(x, a, layout), chunks_of(rows, spans, x.device), sinks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_in_the_products_launch_are_those_of_kernels_of_their_own(shape, dtype):
    x, dy, weight, a, b, layout, s, chunks, sinks = case(shape, dtype)
    of_b, of_a = sinks()
    _, ds = low_rank_gradients(dy, s, b, layout, chunks, of_b)
    dx = gemm(dy, weight, ds, a, transposed=False, layout=layout)
    sum_a(x, ds, layout, chunks, sink=of_a)
    for turn in range(8):  # who takes which piece changes from run to run
        with_a = turn % 2 == 1
        found_b, found_a = sinks()
        found = gemm_sums.run(dy, weight, b, a, layout, Sums(chunks, s, found_b, *((x, found_a) if with_a else ())))
        assert torch.equal(found[0], dx) and torch.equal(found[1], ds)
        for mine, theirs in ((found_b, of_b), *([(found_a, of_a)] if with_a else [])):
            assert theirs.total.any() and torch.equal(mine.total, theirs.total) and torch.equal(mine.stats, theirs.stats)
            assert [part.chunks for part in mine.parts] == [part.chunks for part in theirs.parts] == [chunks.count] * len(mine.parts)
    # again into the same sums, of the last turn: all doubles
    gemm_sums.run(dy, weight, b, a, layout, Sums(chunks, s, found_b, x, found_a))
    assert torch.equal(found_b.total, 2 * of_b.total) and torch.equal(found_a.total, 2 * of_a.total)
    assert not project_beside.words(x.device).any()  # as they were, for the next launch


def test_a_number_that_is_not_finite_is_found_in_the_chunk_where_it_is():
    x, dy, weight, a, b, layout, s, chunks, sinks = case((8192, QKV, 16, FOUR), torch.bfloat16)
    dy[4000, 77], s[1300, 3] = float("inf"), float("nan")
    of_b, of_a = sinks()
    _, ds = low_rank_gradients(dy, s, b, layout, chunks, of_b)
    sum_a(x, ds, layout, chunks, sink=of_a)
    found_b, found_a = sinks()
    gemm_sums.run(dy, weight, b, a, layout, Sums(chunks, s, found_b, x, found_a))
    for mine, theirs in ((found_b, of_b), (found_a, of_a)):
        assert torch.equal(mine.total, theirs.total)
        # the largest finite one is told by fewer pieces the longer they are
        assert torch.equal(mine.stats[:, [0, 2, 3]], theirs.stats[:, [0, 2, 3]])
    assert found_b.stats[0, 0] == 1300 // 512 and found_a.stats[0, 0] == 4000 // 512


def test_partials_too_small_to_keep_their_bits_are_counted():
    x, dy, weight, a, b, layout, s, chunks, sinks = case((8192, QKV, 16, FOUR), torch.bfloat16)
    dy *= 2.0**-35
    of_b, found_b = sinks()[0], sinks()[0]
    low_rank_gradients(dy, s, b, layout, chunks, of_b)
    gemm_sums.run(dy, weight, b, a, layout, Sums(chunks, s, found_b))
    assert torch.equal(found_b.stats, of_b.stats) and found_b.stats[:, 3].all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_models_training_does_not_depend_on_where_sums_are_made(monkeypatch, family):
    rows, found, ways = cases.random_rows([300 + 23 * i for i in range(2 * cases.ROWS)], 96), [], []
    for run in (gemm_sums.run, lambda *given: None):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(triton_path, "gemm_with_sums", lambda *given, run=run, seen=seen: seen.append(run(*given)) or seen[-1])
            model = tiny_model(family, hidden_size=4096, intermediate_size=4096, max_position_embeddings=2048).to("cuda", torch.bfloat16)
            subject = cases.Subject(model, r=8, lora_dropout=0.0)
            found.append(subject.train(rows, cases.FEW[0], steps=2, exactly=True))
        ways.append(any(made is not None for made in seen))
    assert ways == [True, False]
    assert found[0].digest == found[1].digest and found[0].losses == found[1].losses
