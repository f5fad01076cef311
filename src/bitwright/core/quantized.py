"""Quantized models as data: a block after quantization, and what a config.json says of the whole model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.core.account import BlockReport, LinearReport
from bitwright.core.block import Family
from bitwright.core.grid import Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Allocation, Scheme


@dataclass(frozen=True)
class QuantizedBlock:
    """One block after quantization: a QTensor per linear, and the tensors passed through as they were.

    Names are those of the whole model. ``learned`` are the parameters that training found, by ``group/name``.
    """

    linears: Mapping[str, QTensor]
    passed: Mapping[str, Tensor]
    report: BlockReport
    learned: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Departure:
    """A linear's departure from its scheme: the rows and columns of its tile, the number of weights kept exactly."""

    tile: tuple[int, int]
    outliers: int


@dataclass(frozen=True)
class WrittenModel:
    """What the config of a written model has to say.

    ``family`` is None for an architecture that nobody has described. ``dtype`` is that of the scales. ``kept`` are the
    linears that stay as they are, by their names in the model. ``schemes`` are the schemes of linears for which another
    scheme was asked than for most. ``departures`` are linears for which a method chose other groups than their scheme
    has, or in which it kept outliers. Both are by the linears' names on disk. ``only_ours``: there are weights that
    transformers needs our plugin for. ``asked`` says, for messages, what gave a linear its scheme.
    """

    scheme: Scheme
    family: Family | None
    dtype: torch.dtype
    kept: tuple[str, ...] = ()
    departures: Mapping[str, Departure] = field(default_factory=dict)
    only_ours: bool = False
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict)

    @property
    def allocation(self) -> Allocation:
        """The scheme of every linear."""
        return Allocation(self.scheme, {**self.schemes, **dict.fromkeys(self.kept)}, self.asked)


def departures(scheme: Scheme, schemes: Mapping[str, Scheme], rows: Iterable[LinearReport]) -> dict[str, Departure]:
    """The linears that are not as the scheme says, or as their own in ``schemes`` says, from their reports."""
    return {
        row.name: Departure(row.tile, row.outliers)
        for row in rows
        if row.tile != schemes.get(row.name, scheme).tile.size(row.shape) or row.outliers
    }


@dataclass(frozen=True)
class Described:
    """What the quantization_config of a folder says of it, whoever wrote it.

    A new format fills ``grid``, ``tile`` (None if the config does not say it) and ``kept``, the linears that are not
    quantized; ``activations`` and ``kv`` if it has a place for them. If linears may have schemes of their own, it also
    fills ``grids`` and ``named_tiles``, by the names of linears. The other fields are for configs of other tools:
    ``rules`` and ``tiles`` are pairs of a regular expression and the grid or tile of the linears whose names it matches
    from the beginning, of which the first counts; ``departures`` are linears with another tile, or with outliers, than
    their scheme says; ``variant`` is what else the format needs to read its tensors. ``queries``: queries are quantized
    as keys and values are.
    """

    grid: Grid
    activations: Grid | None = None
    kv: Grid | None = None
    kept: tuple[str, ...] = ()
    variant: str = ""
    rules: tuple[tuple[str, Grid], ...] = ()
    departures: Mapping[str, Departure] = field(default_factory=dict)
    tile: Tile | None = None
    tiles: tuple[tuple[str, Tile | None], ...] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)
    named_tiles: Mapping[str, Tile | None] = field(default_factory=dict)
    queries: bool = False

    def grid_of(self, linear: str) -> Grid:
        """The grid of one linear."""
        for name in (linear, f"{linear}.weight"):
            if name in self.grids:
                return self.grids[name]
        return next((grid for pattern, grid in self.rules if re.match(pattern, linear)), self.grid)

    def tile_of(self, linear: str) -> Tile | None:
        """The tile that one linear, or every slice of a stack, is said to have; None where nothing is said."""
        for name in (linear, f"{linear}.weight"):
            if name in self.departures:
                return Tile(*self.departures[name].tile, ragged=self.tile is not None and self.tile.ragged)
            if name in self.named_tiles:
                return self.named_tiles[name]
        return next((tile for pattern, tile in self.tiles if re.match(pattern, linear)), self.tile)


@dataclass(frozen=True)
class Difference:
    """What a linear lost on its way into another format.

    ``codes``: whether it kept them; ``fresh``: that it had none before; ``error`` is ``|Wq - Wx|^2 / |Wq|^2`` between
    the weights [O, I] as the folder that was read says them, and as the client of the new format will compute them,
    both in float32.
    """

    name: str
    codes: bool
    error: float
    fresh: bool = False
