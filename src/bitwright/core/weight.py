"""Which tensors of a checkpoint are quantized, and which are kept."""

import re
from dataclasses import dataclass

from bitwright.core.grid import Tile

NO_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias")
"""How tensors end that old checkpoints hold and no model reads."""


@dataclass(frozen=True)
class Weight:
    """A tensor that is quantized: a linear's [O, I], or [E, O, I] with one such slice per expert.

    ``tensor`` is its name in the checkpoint, ``name`` that of the linear in the result. ``turned`` slices are stored
    [I, O].
    """

    tensor: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def slice(self) -> tuple[int, int]:
        """Rows and columns of the tensor, or of each expert's part, as they are stored."""
        return (self.shape[-2], self.shape[-1])

    @property
    def slices(self) -> int:
        """How many there are: one, or the number of experts."""
        return self.shape[0] if self.stacked else 1

    @property
    def stacked(self) -> bool:
        """Whether experts are stacked in it."""
        return len(self.shape) > 2

    def takes_axis(self, axis: str | None) -> bool:
        """Whether the groups may go along ``axis``: what is stored turned has them along the output already, and
        experts in one tensor, all in the same groups, cannot each have the better one."""
        return not (self.transposed or (self.stacked and axis == "auto"))

    def tile(self, tile: Tile) -> Tile:
        """A scheme's tile, laid on a slice as it is stored."""
        return tile.transposed if self.transposed else tile


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is, and why."""

    tensor: str
    why: str


@dataclass(frozen=True)
class Division:
    """All tensors of a checkpoint, each in one of the two; both in the order of blocks."""

    weights: tuple[Weight, ...]
    kept: tuple[Kept, ...]


def starred(name: str) -> str:
    """A name with ``*`` for the numbers in it: what those of all blocks and experts have in common.

    >>> starred("model.layers.3.mlp.experts.12.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
