"""Documents as a stream: what is held back, where sequences begin, what is read."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.data.stream import Documents, Sequences, Stream, aligned_starts
from pipermoe.specs.errors import UserError


def documents(*lengths: int, first: int = 0) -> Documents:
    """Documents whose tokens count up from `first`."""
    starts = np.cumsum([0, *lengths]).astype(np.uint64)
    return Documents("numbers", np.arange(first, first + int(starts[-1]), dtype=np.uint16), starts, 1000)


def contents(held: Documents) -> list[list[int]]:
    return [held.read(*map(int, pair)).tolist() for pair in np.stack([held.starts[:-1], held.starts[1:]], 1)]


def test_whole_documents_are_held_back():
    train, validation = documents(3, 4, 2, 1).split(0.25)
    assert contents(train) == [[0, 1, 2], [3, 4, 5, 6]]
    assert contents(validation) == [[7, 8], [9]]


def test_a_single_document_is_cut():
    train, validation = documents(10).split(0.2)
    assert contents(train) == [list(range(8))]
    assert contents(validation) == [[8, 9]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=100)
def test_nothing_is_lost_or_seen_twice_by_a_split(lengths, fraction):
    whole = documents(*lengths)
    train, validation = whole.split(fraction)
    assert np.array_equal(np.concatenate([train.tokens, validation.tokens]), whole.tokens)
    assert [each for part in (train, validation) for document in contents(part) for each in document] == list(
        range(sum(lengths))
    )
    assert len(validation.tokens) >= round(len(whole.tokens) * fraction) - 1


def test_a_sequence_is_read_across_shards_with_the_first_token_of_the_next():
    stream = Stream((documents(3), documents(1, first=3), documents(5, first=4)))
    sequences = Sequences.pack(stream, 2, "stream")
    assert len(sequences) == 4
    assert sequences[np.array([[0], [1], [3]])].tolist() == [[[0, 1, 2]], [[2, 3, 4]], [[6, 7, 8]]]
    assert stream.document_starts().tolist() == [0, 3, 4, 9]


def test_the_last_target_is_a_token_of_the_stream():
    assert len(Sequences.pack(Stream((documents(6),)), 2, "stream")) == 2
    assert len(Sequences.pack(Stream((documents(7),)), 2, "stream")) == 3


def test_a_document_that_a_cut_falls_into_begins_the_next_sequence():
    assert aligned_starts([0, 3, 5, 20], 4).tolist() == [0, 3, 5, 9, 13]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_no_sequence_begins_inside_a_document_that_began_in_the_one_before(lengths, seq_len):
    bounds = np.cumsum([0, *lengths]).tolist()
    starts = aligned_starts(bounds, seq_len).tolist()
    for before, start in pairwise(starts):
        assert before < start <= before + seq_len  # nothing is left out
        document = max(bound for bound in bounds if bound <= start)
        assert document == start or document <= before
    for begin, end in pairwise(bounds):
        if end - begin <= seq_len and end < (starts[-1] if starts else 0):
            assert any(start <= begin and end <= start + seq_len for start in starts)


def test_a_token_beyond_the_vocabulary_is_an_error_that_names_the_file():
    damaged = Documents("00003.tokens", np.array([1, 9], np.uint8), np.array([0, 2]), 5)
    with pytest.raises(UserError, match=r"00003\.tokens: holds the token 9, the vocabulary ends at 4"):
        damaged.read(0, 2)
