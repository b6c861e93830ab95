"""The token stream: spans, tiles, positions and token keys depend on each document alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora import stream
from fastlora.errors import InputError

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=5)
# The first words of splitmix64 from state 1234567, published with the generator.
KNOWN = (6457827717110365317, 3203168211198807973, 9817491932198370423)


def make(lengths, ids=None, alignment=16):
    return stream.Stream(tuple(lengths), alignment, tuple(ids or range(len(lengths))))


def test_splitmix64_published_words():
    gamma = 0x9E3779B97F4A7C15
    assert tuple(stream.splitmix64(1234567 + i * gamma) for i in range(3)) == KNOWN


@given(LENGTHS)
def test_stream_spans_and_tiles_cover_every_token_once(lengths):
    made = make(lengths)
    for cut in (made.spans, made.tiles(), made.tiles(48)):
        assert cut[0][0] == 0
        assert cut[-1][1] == made.total
        assert all(one[1] == two[0] for one, two in zip(cut, cut[1:]))
        assert all(start % 16 == 0 and stop % 16 == 0 for start, stop in cut)
    assert all(
        stop - start - length in range(16) for (start, stop), length in zip(made.spans, lengths)
    )


@given(LENGTHS, st.randoms())
def test_stream_tiles_and_keys_move_with_the_document(lengths, random):
    ids = [random.getrandbits(63) for _ in lengths]
    made = make(lengths, ids)
    for (start, stop), length, name in zip(made.spans, lengths, ids):
        alone = make([length], [name])
        inside = [(a - start, b - start) for a, b in made.tiles() if start <= a < stop]
        assert tuple(inside) == alone.tiles()
        assert torch.equal(made.positions()[start:stop], torch.arange(stop - start))
        assert torch.equal(made.token_keys()[start:stop], alone.token_keys())


def test_token_keys_match_integer_arithmetic():
    name = (1 << 63) - 5
    keys = make([3], [name]).token_keys().tolist()
    wanted = [stream.splitmix64((stream.splitmix64(name) + i) % 2**64) for i in range(16)]
    assert [key % 2**64 for key in keys] == wanted


def test_token_keys_differ_between_samples_and_positions():
    keys = make([300, 300], [7, 8]).token_keys()
    assert keys.unique().numel() == keys.numel()


@pytest.mark.parametrize(
    ("lengths", "alignment", "ids", "named"),
    [
        ((0,), 16, (1,), "lengths"),
        ((3,), 0, (1,), "alignment"),
        ((3,), 16, (1, 2), "sample_ids"),
        ((3,), 16, (-1,), "sample_ids"),
        ((3,), 16, (1 << 63,), "sample_ids"),
    ],
)
def test_stream_refuses_bad_input_by_name(lengths, alignment, ids, named):
    with pytest.raises(InputError, match=named):
        stream.Stream(lengths, alignment, ids)


def test_use_nests_and_ends_on_errors():
    one, two = make([3]), make([5, 40])
    with pytest.raises(RuntimeError), stream.use(one):
        with stream.use(two):
            assert stream.active() is two
            assert stream.tiles(two.total) == two.tiles()
        assert stream.active() is one
        raise RuntimeError
    assert stream.active() is None


def test_tiles_without_a_matching_stream_are_fixed_blocks():
    with stream.use(make([5])):
        assert stream.tiles(300) == ((0, 128), (128, 256), (256, 300))
    assert stream.tiles(0) == ()


def test_alignment_for_devices():
    assert (stream.alignment_for("cpu"), stream.alignment_for("cuda")) == (16, 64)
