import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.calibration.tokens import fingerprint, segments
from bitwright.core.errors import CalibrationError

TOKENS = torch.arange(1000)


def test_the_same_seed_gives_the_same_segments() -> None:
    one, other = (segments(TOKENS, 8, 20, seed=5, source="x") for _ in range(2))
    assert torch.equal(one, other)
    torch.manual_seed(99)
    assert torch.equal(segments(TOKENS, 8, 20, seed=5, source="x"), one), "whatever else draws numbers"


def test_another_seed_gives_others() -> None:
    found = {tuple(segments(TOKENS, 8, 20, seed=seed, source="x").flatten().tolist()) for seed in range(10)}
    assert len(found) == 10


def test_drawing_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    segments(TOKENS, 8, 20, seed=5, source="x")
    assert torch.equal(torch.rand(3), expected)


@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 300), st.integers(0, 2**63 - 1))
def test_segments_are_different_windows_of_the_text(samples: int, seqlen: int, extra: int, seed: int) -> None:
    tokens = torch.arange(samples * seqlen + extra)
    found = segments(tokens, samples, seqlen, seed, "x")
    assert found.shape == (samples, seqlen)
    assert torch.equal(found - found[:, :1], torch.arange(seqlen).expand(samples, -1)), "consecutive tokens"
    starts = found[:, 0].tolist()
    assert all(start % seqlen == 0 for start in starts)
    assert len(set(starts)) == samples, "none twice"


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_too_short_says_how_many_tokens_are_there_and_needed(samples: int, seqlen: int, data: st.DataObject) -> None:
    there = data.draw(st.integers(0, samples * seqlen - 1))
    with pytest.raises(CalibrationError) as error:
        segments(torch.arange(there), samples, seqlen, 0, "my.txt")
    message = str(error.value)
    needs = f"{samples} segments of {seqlen} tokens need {samples * seqlen} tokens, but 'my.txt' has {there};"
    assert needs in message
    # Each way out that is named is one, as far as there is any.
    if there >= seqlen:
        fewer = int(message.rpartition("--samples ")[2].split(",")[0])
        assert segments(torch.arange(there), fewer, seqlen, 0, "my.txt").shape == (fewer, seqlen)
    else:
        assert "--samples" not in message
    if " or --seqlen " in message:
        shorter = int(message.rpartition("--seqlen ")[2])
        assert segments(torch.arange(there), samples, shorter, 0, "my.txt").shape == (samples, shorter)
    else:
        assert there < samples


def test_a_seed_that_is_too_large_is_refused() -> None:
    with pytest.raises(CalibrationError, match="must be below 9223372036854775808"):
        segments(TOKENS, 1, 1, 2**63, "x")


def test_the_fingerprint_is_of_the_numbers() -> None:
    tokens = torch.tensor([[1, 2], [300, 4]])
    by_hand = b"".join(n.to_bytes(8, "little") for n in (1, 2, 300, 4))
    assert fingerprint(tokens) == hashlib.sha256(by_hand).hexdigest()
    assert fingerprint(tokens.to(torch.int32)) == fingerprint(tokens)
    assert fingerprint(tokens.T) != fingerprint(tokens)
