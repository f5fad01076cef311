"""What comes out of a block, and the account that is given of it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.core.block import Family
from bitwright.core.grid import Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme


@dataclass(frozen=True)
class LinearReport:
    """The account of one linear.

    ``tile`` is the rows and columns that share a scale, ``outliers`` how many weights are kept exactly,
    ``outlier_share`` of all.
    ``bits_per_weight`` counts all that is packed, scales, zeros and outliers too. ``weight_error`` is
    ``|W - Wq|^2 / |W|^2``; ``output_error`` is ``|XW' - XWq'|^2 / |XW'|^2`` on the calibration tokens as the
    full-precision blocks produce them, None without calibration text. ``digest`` is that of the tensors that the
    linear was stored as (``core/tensor_bytes.py``), "" before it is.
    """

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    bits_per_weight: float
    storage_bits: int
    weight_error: float
    output_error: float | None
    outliers: int = 0
    outlier_share: float = 0.0
    digest: str = ""


@dataclass(frozen=True)
class BlockReport:
    """The account of one block.

    ``output_error`` is the relative squared error of the block's output against the full-precision path,
    with everything before it quantized too. ``fallbacks`` are said at the end of a run, never only logged.
    """

    name: str
    linears: tuple[LinearReport, ...]
    output_error: float | None = None
    fallbacks: tuple[str, ...] = ()


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

    ``family`` is None for an architecture that nobody has described. ``dtype`` is that of the scales.
    ``kept`` are the linears that stay as they are, by their names in the model, and ``departures`` those unlike the
    others, by their names on disk. ``only_ours``: there are weights that transformers needs our plugin for.
    """

    scheme: Scheme
    family: Family | None
    dtype: torch.dtype
    kept: tuple[str, ...] = ()
    departures: Mapping[str, Departure] = field(default_factory=dict)
    only_ours: bool = False


def departures(scheme: Scheme, rows: Iterable[Mapping[str, Any]]) -> dict[str, Departure]:
    """The linears that differ from the scheme, from their reports as the journal keeps them."""
    departing = {}
    for row in rows:
        shape, tile = (row["shape"][0], row["shape"][1]), (row["tile"][0], row["tile"][1])
        if tile != scheme.tile.size(shape) or row["outliers"]:
            departing[row["name"]] = Departure(tile, row["outliers"])
    return departing


@dataclass(frozen=True)
class Described:
    """What the quantization_config of a folder says of it, whoever wrote it.

    ``grid`` is that of its linears, in whose ``codes`` they are read; ``kept`` the linears that are not quantized.
    ``variant`` is what else a format needs to know to read its tensors. ``rules`` are regular expressions with the grid
    of linears whose names they match from the beginning; the first that does counts, other linears have ``grid``.
    ``departures`` are the linears that are said to be unlike the others. ``tile`` is that of the other linears, None
    where nothing is said of it; ``tiles`` has rules for it like ``rules``.
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

    def grid_of(self, linear: str) -> Grid:
        """The grid of one linear."""
        return next((grid for pattern, grid in self.rules if re.match(pattern, linear)), self.grid)

    def tile_of(self, linear: str) -> Tile | None:
        """The tile that one linear, or every slice of a stack, is said to have; None where nothing is said."""
        for name in (linear, f"{linear}.weight"):
            if name in self.departures:
                return Tile(*self.departures[name].tile, ragged=self.tile is not None and self.tile.ragged)
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
