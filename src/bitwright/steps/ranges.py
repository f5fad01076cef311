"""The range decision: which interval of its weights a tile's codes span."""

from jaxtyping import Float
from torch import Tensor

from bitwright.core.qtensor import tiled
from bitwright.core.scheme import Tile


def minmax(weight: Float[Tensor, "O I"], tile: Tile) -> tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]:
    """The smallest and the largest weight of each tile, as float32."""
    low, high = tiled(weight, tile).float().aminmax(dim=3)
    return low.amin(dim=1), high.amax(dim=1)
