"""MLC-LLM's presets of weights, and a quantized weight in the codes of one.

With b bits, off = 2^(b-1) - 1 and groups of g along the input, a weight [N, K] is

    W[n, k] ~ (code - off) * scale[n, k // g],   code = 0 .. 2^b - 1,   scale float16 of either sign

so that whatever runs from -off to off + 1 steps can be said, or, its scale negated, from -off - 1 to off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from bitwright.core.convert import split, with_scales
from bitwright.core.decisions import LinearDecision
from bitwright.core.grid import FULL, Grid, Tile, Zero
from bitwright.core.panels import panels
from bitwright.core.qtensor import QTensor, affine, quantize, tiled, whole
from bitwright.core.quantized import Difference
from bitwright.core.scheme import NAMED, Scheme
from bitwright.steps.apply import quantize_linear
from bitwright.steps.range_fit import fitted

WORD_BITS = 32


@dataclass(frozen=True)
class Preset:
    """MLC's name, and our scheme for it. ``embeddings``: whether embedding and output layer are quantized too."""

    name: str
    scheme: Scheme
    embeddings: bool = True

    @property
    def group(self) -> int:
        """Weights along the input that share a scale."""
        return self.scheme.tile.in_

    @property
    def in_word(self) -> int:
        """Codes in a word of 32 bits."""
        return WORD_BITS // self.scheme.weight.bits

    def words(self, columns: int) -> int:
        """Words of a row."""
        return ceil(columns / self.group) * self.group // self.in_word

    def holds(self, grid: Grid, tile: Tile) -> bool:
        """Whether every weight of this grid and tile can be said exactly, but for the rounding of its scale."""
        own = self.scheme.weight
        if grid.zero is Zero.REAL:
            return False
        fits = grid.bits <= own.bits if grid.symmetric else grid.steps <= -own.qmin
        return fits and (tile.in_ == FULL or tile.in_ % self.group == 0)


PRESETS = tuple(Preset(name.removeprefix("mlc:"), scheme) for name, scheme in [*NAMED.items()][::-1])
"""Those that quantize everything, few bits first."""
AUTOAWQ, AUTOAWQ_GRID, AUTOAWQ_GROUP = "q4f16_autoawq", Grid.integers(4), 128
"""MLC's name for AutoAWQ's layout, and what it holds."""
EMBEDDINGS_KEPT = Preset("q4f16_2", NAMED["mlc:q4f16_1"], embeddings=False)


def is_autoawq(grid: Grid, tile: Tile) -> bool:
    """Whether weights of this grid and tile go into AutoAWQ's layout."""
    return grid == AUTOAWQ_GRID and tile.out == 1 and tile.in_ > 0 and tile.in_ % AUTOAWQ_GROUP == 0


def as_autoawq(weight: QTensor) -> QTensor | None:
    """The same weight in AutoAWQ's groups; None where it cannot be said."""
    outliers = weight.outlier_index is not None and weight.outlier_index.numel() > 0
    if outliers or not is_autoawq(weight.grid, weight.tile):
        return None
    made = split(weight, Tile(1, AUTOAWQ_GROUP))
    return None if made is None else replace(with_scales(made, torch.float16), outlier_index=None, outlier_value=None)


def placed(weight: QTensor, preset: Preset) -> QTensor | None:
    """The same weight in a preset's codes, each group turned round where that fits; None where it cannot be said."""
    grid, tile = preset.scheme.weight, preset.scheme.tile
    columns, (t_o, t_i) = weight.shape[1], weight.tile.size(weight.shape)
    if weight.grid.zero is Zero.REAL or (weight.outlier_index is not None and weight.outlier_index.numel()):
        return None
    if t_i != columns and t_i % preset.group:
        return None
    levels = weight.codes.to(torch.int16)
    if weight.zero is not None:
        levels = whole(tiled(levels, weight.tile) - weight.zero.to(torch.int16)[:, None, :, None], weight.shape)
    groups = tiled(levels, tile)
    low, high = groups.amin((1, 3)), groups.amax((1, 3))
    straight = (low >= grid.qmin) & (high <= grid.qmax)
    turned = (-high >= grid.qmin) & (-low <= grid.qmax)
    if not bool((straight | turned).all()):
        return None
    sign = torch.where(straight, 1, -1).to(torch.int16)
    starts = torch.arange(0, columns, preset.group, device=levels.device) // t_i
    scale = weight.scale.repeat_interleave(t_o, 0)[:, starts] * sign
    codes = whole(groups * sign[:, None, :, None], weight.shape).to(torch.int8)
    return QTensor(codes, scale.to(torch.float16), None, grid, tile)


@torch.no_grad()
def fitted_to(weight: Float[Tensor, "N K"], preset: Preset) -> QTensor:
    """A weight that has no codes yet, or none that can be said, in those of least squared error."""
    grid, tile = preset.scheme.weight, preset.scheme.tile
    parts = []
    for rows in panels((weight.shape[0], weight.shape[1]), tile):
        part = weight[rows].float()
        scale, _ = affine(*fitted(part, grid, tile, torch.float16, alignment=0.0), grid, torch.float16)
        parts.append(QTensor(quantize(part, scale, None, grid, tile), scale, None, grid, tile))
    return QTensor.of_rows(parts)


def fitted_to_autoawq(weight: Float[Tensor, "N K"]) -> QTensor:
    """The same in AutoAWQ's layout, whose groups have to divide the row."""
    grid, tile = AUTOAWQ_GRID, Tile(1, AUTOAWQ_GROUP)
    parts = []
    for rows in panels((weight.shape[0], weight.shape[1]), tile):
        part = weight[rows].float()
        low, high = fitted(part, grid, tile, torch.float16, alignment=0.0)
        decision = LinearDecision(low=low, high=high)
        parts.append(quantize_linear(part, decision, Scheme(grid, tile), torch.float16))
    return QTensor.of_rows(parts)


def joined(parts: list[QTensor]) -> QTensor:
    """The weights of linears that read the same input, one below the other."""
    return replace(QTensor.of_rows(parts), tile=parts[0].tile)


def packed(weight: QTensor, preset: Preset) -> Int32[Tensor, "N W"]:
    """Codes in words of 32 bits, the first of a word in its lowest bits; no code lies in two words, and what is left
    of a word, and of the last group, is 0."""
    (rows, columns), bits, words = weight.shape, weight.grid.bits, preset.words(weight.shape[1])
    found = torch.zeros(rows, words, dtype=torch.int32)
    for part in panels((rows, columns), weight.tile):
        codes = (weight.codes[part] - weight.grid.qmin).to(torch.int32)
        codes = torch.nn.functional.pad(codes, (0, words * preset.in_word - columns))
        for place, one in enumerate(codes.view(len(codes), words, preset.in_word).unbind(2)):
            found[part] |= one << place * bits
    return found


def unpacked(words: Int32[Tensor, "R W"], preset: Preset, columns: int) -> Int8[Tensor, "R K"]:
    """The codes that ``packed`` makes rows of words from, as levels: from -off to off + 1."""
    grid, codes = preset.scheme.weight, torch.empty(*words.shape, preset.in_word, dtype=torch.int8)
    for place in range(preset.in_word):
        codes[:, :, place] = (words >> place * grid.bits) & grid.steps
    return codes.view(len(words), -1)[:, :columns] + grid.qmin


def lost(name: str, weight: Tensor, made: QTensor, fresh: bool = True) -> Difference:
    """Of a weight that had no codes, or whose codes were not kept, a part at a time."""
    gone = size = 0.0
    for rows in _slices(len(weight)):
        before = weight[rows].float()
        zero = None if made.zero is None else made.zero[rows]
        part = QTensor(made.codes[rows], made.scale[rows], zero, made.grid, made.tile).dequantize(torch.float32)
        gone += float((before - part).double().square().sum())
        size += float(before.double().square().sum())
    return Difference(name, False, gone / size if size else 0.0, fresh)


def rounded(weight: Tensor) -> float:
    """The relative squared error, |W - half(W)|^2 / |W|^2, of a tensor in float16; a part at a time."""
    gone = size = 0.0
    for rows in _slices(len(weight)):
        before = weight[rows].float()
        gone += float((before - before.half().float()).double().square().sum())
        size += float(before.double().square().sum())
    return gone / size if size else 0.0


def _slices(rows: int, at_once: int = 4096) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, rows, at_once))
