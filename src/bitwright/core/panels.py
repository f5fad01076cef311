"""Panels: a weight cut into whole rows, so that no temporary is larger than a panel, however large the weight."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from bitwright.core.grid import FULL, Tile

PANEL = 2**20
"""The number of weights in a panel (at least one tile's rows): its temporaries fit into a cache that cores share."""
CACHED = 2**17
"""The number of weights whose temporaries stay in the cache of one core."""
TOGETHER = 2**22
"""The number of values of a file's tensor that are converted at a time, rows as they come."""


def panels(shape: tuple[int, int], tile: Tile) -> list[slice]:
    """The rows of a weight [O, I] in panels that cut no tile."""
    rows, columns = shape
    unit = rows if tile.out == FULL else tile.out
    height = max(1, PANEL // max(1, columns * unit)) * unit
    return [slice(start, min(start + height, rows)) for start in range(0, rows, max(1, height))]


def row_panels(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a tensor [R, ...], ``TOGETHER`` values at a time, and one row at least."""
    height = max(1, TOGETHER // max(1, prod(shape[1:])))
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))


def in_cache(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors [P, ...] alike along P, so that the part of the first that each core takes stays in its cache.

    On a GPU, which likes large tensors, they stay whole.
    """
    first, limit = tensors[0], CACHED * torch.get_num_threads()
    if first.device.type != "cpu" or first.numel() <= limit:
        return [tensors]
    rows = max(1, limit // first[0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
