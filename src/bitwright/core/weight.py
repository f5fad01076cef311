"""The division of a checkpoint's tensors: which are quantized, and which are kept."""

import re
from dataclasses import dataclass, replace

from bitwright.core.grid import Tile
from bitwright.core.scheme import Scheme

NO_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias")
"""The ends of names of tensors that old checkpoints hold and no model reads."""


@dataclass(frozen=True)
class Weight:
    """A tensor that is quantized: a linear's [O, I], or a stack of experts [E, O, I], one linear each.

    ``tensor`` is its name in the checkpoint, ``name`` that of the linear in the result. A ``transposed`` weight is
    stored [I, O], or [E, I, O].
    """

    tensor: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def slice(self) -> tuple[int, int]:
        """Rows and columns of the matrix, or of each expert's matrix, as stored."""
        return (self.shape[-2], self.shape[-1])

    @property
    def slices(self) -> int:
        """The number of matrices: one, or the number of experts."""
        return self.shape[0] if self.stacked else 1

    @property
    def stacked(self) -> bool:
        """Whether the tensor is a stack of experts."""
        return len(self.shape) > 2

    def takes_tiles(self, compared: bool) -> bool:
        """Whether a method may choose its tiles; ``compared`` if it takes the better one for each linear.

        Slices that are stored transposed have groups along the output already, and experts in one tensor share a tile.
        """
        return not (self.transposed or (self.stacked and compared))

    def tile(self, tile: Tile) -> Tile:
        """The scheme's tile, laid on a matrix as it is stored."""
        return tile.transposed if self.transposed else tile

    def scheme(self, scheme: Scheme) -> Scheme:
        """A scheme, its tile laid on a slice as it is stored."""
        return replace(scheme, tile=self.tile(scheme.tile))


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is, and why."""

    tensor: str
    why: str


@dataclass(frozen=True)
class Division:
    """All tensors of a checkpoint, each either quantized or kept, in the order of the blocks."""

    weights: tuple[Weight, ...]
    kept: tuple[Kept, ...]


def starred(name: str) -> str:
    """A name with ``*`` for the numbers in it, which all blocks and experts have in common.

    >>> starred("model.layers.3.mlp.experts.12.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
