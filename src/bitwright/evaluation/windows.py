"""The papers' protocol for perplexity: the whole text tokenized once, cut into consecutive windows."""

from jaxtyping import Int
from torch import Tensor

from bitwright.core.errors import CalibrationError


def consecutive(tokens: Int[Tensor, " M"], seqlen: int, windows: int | None, source: str) -> Int[Tensor, "W T"]:
    """The first ``windows`` non-overlapping windows of ``seqlen`` tokens; all whole ones where None.

    Raises CalibrationError where the text has fewer.
    """
    if seqlen < 2:
        raise CalibrationError(f"windows of {seqlen} tokens predict nothing; --seqlen must be at least 2")
    if windows is not None and windows < 1:
        raise CalibrationError(f"{windows} windows asked for; --windows must be at least 1")
    available = len(tokens) // seqlen
    if available < (windows or 1):
        needed = (windows or 1) * seqlen
        raise CalibrationError(
            f"{windows or 1} windows of {seqlen} tokens need {needed} tokens, but '{source}' has {len(tokens)}, "
            f"enough for {available}; take a longer text, fewer --windows, or a shorter --seqlen"
        )
    count = windows or available
    return tokens[: count * seqlen].view(count, seqlen)
