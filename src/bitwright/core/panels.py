"""A weight in panels of whole rows, so that no temporary is larger than a panel, however large the weight."""

from bitwright.core.scheme import FULL, Tile

PANEL = 2**22
"""Weights in a panel, or one tile's rows."""


def panels(shape: tuple[int, int], tile: Tile) -> list[slice]:
    """The rows of a weight [O, I] in panels that cut no tile."""
    rows, columns = shape
    unit = rows if tile.out == FULL else tile.out
    height = max(1, PANEL // max(1, columns * unit)) * unit
    return [slice(start, min(start + height, rows)) for start in range(0, rows, max(1, height))]
