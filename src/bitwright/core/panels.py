"""A weight in panels of whole rows, so that no temporary is larger than a panel, however large the weight."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bitwright.core.grid import FULL, Tile

PANEL = 2**20
"""Weights in a panel, or one tile's rows: few enough for temporaries in a cache that cores share."""
CACHED = 2**17
"""Weights whose temporaries stay in the cache of a core."""


def panels(shape: tuple[int, int], tile: Tile) -> list[slice]:
    """The rows of a weight [O, I] in panels that cut no tile."""
    rows, columns = shape
    unit = rows if tile.out == FULL else tile.out
    height = max(1, PANEL // max(1, columns * unit)) * unit
    return [slice(start, min(start + height, rows)) for start in range(0, rows, max(1, height))]


def in_cache(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors [P, ...] cut alike along P, so that the first one's part of each core stays in that core's cache; whole
    on a GPU, which likes large ones."""
    first, each = tensors[0], CACHED * torch.get_num_threads()
    if first.device.type != "cpu" or first.numel() <= each:
        return [tensors]
    rows = max(1, each // first[0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
