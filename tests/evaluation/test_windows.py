import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import CalibrationError
from bitwright.evaluation.measure import consecutive


@given(st.integers(0, 500), st.integers(2, 60), st.none() | st.integers(1, 12))
def test_windows_follow_one_another_from_the_start(there: int, seqlen: int, asked: int | None) -> None:
    tokens, available = torch.arange(there), there // seqlen
    if available < (asked or 1):
        with pytest.raises(CalibrationError) as error:
            consecutive(tokens, seqlen, asked, "my.txt")
        needed = (asked or 1) * seqlen
        assert f"tokens need {needed} tokens, but 'my.txt' has {there}, enough for {available}" in str(error.value)
    else:
        found = consecutive(tokens, seqlen, asked, "my.txt")
        assert found.shape == (asked or available, seqlen)
        assert found.flatten().tolist() == list(range((asked or available) * seqlen))


@pytest.mark.parametrize("seqlen", [-1, 0, 1])
def test_a_window_that_predicts_nothing_is_refused(seqlen: int) -> None:
    with pytest.raises(CalibrationError, match=f"windows of {seqlen} tokens predict nothing"):
        consecutive(torch.arange(10), seqlen, None, "x")


@pytest.mark.parametrize("windows", [-1, 0])
def test_no_windows_are_refused(windows: int) -> None:
    with pytest.raises(CalibrationError, match=f"{windows} windows asked for; --windows must be at least 1"):
        consecutive(torch.arange(10), 2, windows, "x")
