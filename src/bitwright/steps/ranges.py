"""The range decision: which interval of its weights a tile's codes span."""

from jaxtyping import Float
from torch import Tensor

from bitwright.core.qtensor import tiled
from bitwright.core.scheme import Tile


def minmax(weight: Float[Tensor, "O I"], tile: Tile) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The smallest and the largest weight of each tile, as float32."""
    tiles = tiled(weight, tile).float()
    return tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
