"""The reference kernel: a linear that computes from its packed weight; it is exact rather than fast.

It unpacks some output rows, dequantizes them by the formula of ``core/qtensor.py``, multiplies, and goes on to the next
rows. So the whole weight is never in memory. All shapes of tiles take one path.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, prod

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from bitwright.core.fake_quant import fake_quantize_tokens
from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.packing import unpack, unpack_down
from bitwright.core.qtensor import dequantize

WORD_BITS, CODES_PER_RUN = 32, 32
SLAB_WEIGHTS = 2**20
"""The number of weights that are dequantized at a time; unpacking takes about 20 bytes for each."""


class PackedLinear(nn.Module):
    """A linear layer [O, I] that keeps its weight packed, in tensors with the names and bytes that they have on disk.

    It has P x Q tiles and K outliers.

    Weights have the values of ``QTensor.dequantize``, computed in ``dtype``, the dtype of scales and outliers on disk;
    the model may run in another dtype. With ``activations``, inputs are quantized per token.
    """

    weight_packed: Int[Tensor, "O words"]
    weight_scale: Float[Tensor, "P Q"]
    weight_zero_point: Int[Tensor, "words Q"] | None
    weight_minimum: Float[Tensor, "P Q"] | None
    weight_shape: Int[Tensor, " 2"]
    weight_tile: Int[Tensor, " 2"] | None
    outlier_index: Int[Tensor, " K"] | None
    outlier_value: Float[Tensor, " K"] | None
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        grid: Grid,
        tile: Tile,
        dtype: torch.dtype,
        *,
        outliers: int = 0,
        bias: nn.Parameter | None = None,
        activations: Grid | None = None,
    ) -> None:
        """Make room for the tensors, to be loaded later. Raises SchemeError if the tile does not divide the weight."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.grid, self.tile, self.dtype, self.activations = grid, tile, dtype, activations
        (rows, columns), (p, q) = shape, tile.counts(shape)
        real = grid.zero is Zero.REAL
        zeros = None if grid.symmetric or real else _words(ceil(p * grid.bits / WORD_BITS), q)
        self.register_buffer("weight_packed", _words(rows, ceil(columns * grid.bits / WORD_BITS)))
        self.register_buffer("weight_scale", torch.empty(p, q, dtype=dtype))
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_minimum", torch.empty(p, q, dtype=dtype) if real else None)
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
        self.register_buffer("weight_tile", torch.empty(2, dtype=torch.int64) if tile.cut(shape) else None)
        self.register_buffer("outlier_index", _words(outliers) if outliers else None)
        self.register_buffer("outlier_value", torch.empty(outliers, dtype=dtype) if outliers else None)
        self.register_parameter("bias", bias)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """Compute ``x W^T + bias`` in the dtype of ``x``."""
        if self.activations is not None:
            x = fake_quantize_tokens(x, self.activations)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for start, stop in self._slabs():
            bias = None if self.bias is None else self.bias[start:stop]
            y[..., start:stop] = nn.functional.linear(x, self.rows(start, stop).to(x.dtype), bias)
        return y

    def rows(self, start: int, stop: int) -> Float[Tensor, "R I"]:
        """Rows [start, stop) of the weight, dequantized in ``dtype``."""
        codes = unpack(self.weight_packed[start:stop], self.grid, self.in_features)
        t_o, _ = self.tile.size((self.out_features, self.in_features))
        first, tiles = start // t_o, torch.arange(start, stop, device=codes.device) // t_o
        scale, zero = self.weight_scale[tiles].to(self.dtype), self._zero(first, ceil(stop / t_o))
        zero = None if zero is None else zero[tiles - first]
        weight = dequantize(codes, scale, zero, replace(self.tile, out=1)).to(self.dtype)
        self._place_outliers(weight, start)
        return weight

    def dequantize(self) -> Float[Tensor, "O I"]:
        """Dequantize the whole weight, which the forward pass never does."""
        return torch.cat([self.rows(start, stop) for start, stop in self._slabs()])

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """The whole weight, for models that read a linear's weight; most of them read only its dtype."""
        return self.dequantize()

    def extra_repr(self) -> str:
        """Shape, grid and tile, for ``print(model)``."""
        kept = 0 if self.outlier_index is None else self.outlier_index.numel()
        return f"{self.in_features}, {self.out_features}, {self.grid}, {self.tile}, outliers={kept}"

    def _slabs(self) -> Iterator[tuple[int, int]]:
        step = max(1, SLAB_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)

    def _zero(self, first: int, last: int) -> Shaped[Tensor, "T Q"] | None:
        """The zeros of tile rows [first, last): minima, or zero points, which are unpacked 32 at a time."""
        if self.weight_minimum is not None:
            return self.weight_minimum[first:last]
        if self.weight_zero_point is None:
            return None
        p, bits, run, until = len(self.weight_scale), self.grid.bits, first // CODES_PER_RUN, ceil(last / CODES_PER_RUN)
        words = self.weight_zero_point[run * bits : until * bits]
        unpacked = unpack_down(words, self.grid, min(until * CODES_PER_RUN, p) - run * CODES_PER_RUN)
        return unpacked[first - run * CODES_PER_RUN : last - run * CODES_PER_RUN]

    def _place_outliers(self, weight: Float[Tensor, "R I"], start: int) -> None:
        if self.outlier_index is None or self.outlier_value is None:
            return
        begin = start * self.in_features
        ends = torch.tensor([begin, begin + prod(weight.shape)], device=weight.device)
        low, high = torch.searchsorted(self.outlier_index.long(), ends).tolist()
        place = self.outlier_index[low:high].long() - begin
        weight.view(-1)[place] = self.outlier_value[low:high].to(weight.dtype)


def _words(*shape: int) -> Int[Tensor, "..."]:
    return torch.empty(shape, dtype=torch.int32)
