import pytest
import torch

from bitwright.core.scheme import FULL, Tile
from bitwright.steps.ranges import minmax

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, -6.0, 0.5, 8.0]])


@pytest.mark.parametrize(
    ("tile", "low", "high"),
    [
        (Tile(1, FULL), [[-2.0], [-6.0]], [[4.0], [8.0]]),
        (Tile(1, 2), [[-2.0, 3.0], [-6.0, 0.5]], [[1.0, 4.0], [-5.0, 8.0]]),
        (Tile(2, 1), [[-5.0, -6.0, 0.5, 4.0]], [[1.0, -2.0, 3.0, 8.0]]),
        (Tile(FULL, FULL), [[-6.0]], [[8.0]]),
        (Tile(2, 2), [[-6.0, 0.5]], [[1.0, 8.0]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_smallest_and_largest_of_each_tile(
    dtype: torch.dtype, tile: Tile, low: list[list[float]], high: list[list[float]]
) -> None:
    found = minmax(WEIGHT.to(dtype), tile)
    assert (found[0].tolist(), found[1].tolist()) == (low, high)
    assert found[0].dtype == found[1].dtype == torch.float32
