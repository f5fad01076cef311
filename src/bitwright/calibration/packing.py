"""Pack documents into segments of equal length, as a model that was trained on packed documents sees them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

AHEAD = 64
"""The number of waiting documents among which one is looked for that fits."""


def packed(
    documents: Iterable[Int[Tensor, " _"]], seqlen: int, beginning: Sequence[int] = ()
) -> Iterator[Int[Tensor, " T"]]:
    """Yield segments of ``seqlen`` tokens; ``beginning`` is in front of each segment and of each document.

    A segment is filled with documents that fit as a whole: the first that waits, then the longest of the next ``AHEAD``
    that fits. If none does, the longest of them is torn, which suffers least, and goes on in the next segment. No token
    is lost but those that fill no segment at the end. One long document becomes consecutive windows.
    """
    front, rest = torch.tensor(beginning, dtype=torch.int64), iter(documents)
    waiting = list(islice(rest, AHEAD))
    while waiting:
        pieces, room = list[Tensor](), seqlen
        while room and waiting:
            space = max(room - len(front), 0)
            index = 0 if not pieces else _fitting(waiting, space)
            document = waiting[index]
            pieces += [front[:room], document[:space]]
            room = max(room - len(front) - len(document), 0)
            if len(document) <= space:
                waiting.pop(index)
                waiting.extend(islice(rest, 1))
            elif space:
                waiting.insert(0, waiting.pop(index)[space:])
        if not room:
            yield torch.cat(pieces)


def _fitting(waiting: Sequence[Int[Tensor, " _"]], space: int) -> int:
    """The place of the longest document that fits, or of the longest of all if none does."""
    lengths = [len(document) for document in waiting]
    fitting = [length for length in lengths if length <= space]
    return lengths.index(max(fitting or lengths))
