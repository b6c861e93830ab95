"""Chunks of the token sums: where they start, and that a document's own length alone decides it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from fastlora import stream
from fastlora.kernels.chunks import LONGEST, LONGEST_ALONE, UNIT, chunks_of
from fastlora.ops.triton_path import chunks_here

CPU = torch.device("cpu")


def starts_of(chunks):
    """First unit of each chunk, read from the table as the kernel does."""
    following = chunks.table[0].tolist()
    return [unit for unit in range(chunks.units) if following[unit] == unit]


@pytest.mark.parametrize("lengths", [(64,), (512, 64, 576), (320, 192), (2048, 128, 1536, 640)])
def test_chunks_of_start_at_every_document_and_every_longest_step(lengths):
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    chunks = chunks_of(start, tuple(spans), CPU)
    # a document of up to LONGEST tokens is cut in half
    wanted = [row // UNIT for low, high in spans for row in range(low, high, LONGEST if high - low > LONGEST else LONGEST // 2)]
    assert starts_of(chunks) == wanted and chunks.count == len(wanted)
    following, before = chunks.table.tolist()
    assert len(following) == chunks.units + 2
    for unit in range(chunks.units + 2):
        assert before[unit] == sum(w < unit for w in wanted)
        assert following[unit] == min((w for w in wanted if w >= unit), default=chunks.units)
    # the unit before a chunk is the last of one, and so is the stream's; one more may be read ahead
    assert chunks.ends.dtype == torch.int8 and len(chunks.ends) == chunks.units + 1
    assert [unit for unit in range(chunks.units) if chunks.ends[unit]] == [w - 1 for w in (*wanted[1:], chunks.units)]


@pytest.mark.parametrize("rows", [0, 1, 63, 128, 129, 1000])
@pytest.mark.parametrize("spans", [None, ((0, 16), (16, 1000))], ids=["no stream", "documents off the step"])
def test_chunks_of_rows_without_usable_documents_are_fixed(rows, spans):
    chunks = chunks_of(rows, spans, CPU)
    assert starts_of(chunks) == list(range(0, chunks.units, LONGEST_ALONE // UNIT))
    assert chunks.count == -(-rows // LONGEST_ALONE)


def test_chunks_here_are_the_stream_s_own_and_kept_with_it():
    one, other = (stream.Stream(lengths, UNIT, (0,) * len(lengths)) for lengths in ((640,), (64, 576)))
    for current, wanted in ((one, [0, 8]), (other, [0, 1, 9]), (one, [0, 8])):
        with stream.use(current):
            found = chunks_here(torch.zeros(640, 1))
            assert starts_of(found) == wanted and chunks_here(torch.zeros(640, 1)) is found
            assert chunks_here(torch.zeros(64, 1)).count == 1
    assert starts_of(chunks_here(torch.zeros(640, 1))) == [0, 2, 4, 6, 8]
