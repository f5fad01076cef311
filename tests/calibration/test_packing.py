"""Documents packed into segments: nothing lost, nothing torn without need."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.calibration.packing import packed

BOS = -1


def lists(lengths: list[int], seqlen: int, beginning: tuple[int, ...] = ()) -> list[list[int]]:
    """Segments of documents whose tokens are their number times 1000, counted up."""
    documents = [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]
    return [segment.tolist() for segment in packed(documents, seqlen, beginning)]


def test_one_document_becomes_consecutive_windows() -> None:
    assert lists([10], 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert lists([10], 3, (BOS,)) == [[BOS, n, n + 1] for n in range(0, 10, 2)]


def test_a_document_that_fits_goes_before_one_that_must_be_torn() -> None:
    assert lists([4, 5, 2], 6) == [[0, 1, 2, 3, 2000, 2001]]
    assert lists([4, 5, 2, 1], 6)[1] == [1000, 1001, 1002, 1003, 1004, 3000]


def test_what_is_torn_goes_on_in_the_next_segment() -> None:
    assert lists([4, 5, 9], 6, (BOS,)) == [
        [BOS, 0, 1, 2, 3, BOS],
        [BOS, 1000, 1001, 1002, 1003, 1004],
        [BOS, 2000, 2001, 2002, 2003, 2004],
    ]
    assert lists([3, 8], 6, (BOS,)) == [[BOS, 0, 1, 2, BOS, 1000], [BOS, 1001, 1002, 1003, 1004, 1005]]


@given(st.lists(st.integers(1, 40), max_size=100), st.integers(3, 30), st.sampled_from([(), (BOS,), (BOS, BOS)]))
def test_every_token_is_there_once(lengths: list[int], seqlen: int, beginning: tuple[int, ...]) -> None:
    segments = lists(lengths, seqlen, beginning)
    tokens = [token for segment in segments for token in segment if token != BOS]
    assert len(set(tokens)) == len(tokens)
    assert sum(lengths) - len(tokens) < seqlen, "less than a segment is left over"
    for segment in segments:
        assert len(segment) == seqlen and tuple(segment[: len(beginning)]) == beginning
        for before, token in pairwise(segment):
            follows = token == before + 1 or token == BOS
            assert follows or before == BOS or not beginning, "every other document begins as a text does"


@given(st.lists(st.integers(1, 10), min_size=1, max_size=200), st.integers(10, 40))
def test_few_are_torn(lengths: list[int], seqlen: int) -> None:
    segments = lists(lengths, seqlen)
    torn = sum(segment[0] % 1000 != 0 for segment in segments)
    assert torn <= max(len(segments) - 1, 0), "at most one at each joint"
    whole = lists([5] * 40, 20)
    assert all(segment[0] % 1000 == 0 for segment in whole), "none if they fit exactly"
