"""MLC-LLM's presets of weights: which tensors they store, and a quantized weight in the codes of one.

With b bits, off = 2^(b-1) - 1 and groups of g along the input, a weight [N, K] is

    W[n, k] ~ (code - off) * scale[n, k // g],   code = 0 .. 2^b - 1,   scale float16 of either sign

so that levels from -off to off + 1 can be held, or, under a negated scale, from -off - 1 to off. One preset,
q4f16_autoawq, is AWQ's layout, with zero points (``formats/awq.py``).
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from bitwright.core.convert import SquaredError, rows_of, split, with_scales
from bitwright.core.decisions import LinearDecision
from bitwright.core.engine_file import Shape
from bitwright.core.grid import FULL, Grid, Tile, Zero
from bitwright.core.panels import panels, row_panels
from bitwright.core.qtensor import WORD_BITS, QTensor, tiled, whole
from bitwright.core.quantized import Difference
from bitwright.core.scheme import NAMED, Scheme
from bitwright.formats import awq
from bitwright.steps.apply import quantize_linear
from bitwright.steps.range_fit import fitted


@dataclass(frozen=True)
class Preset:
    """A quantization of MLC's: its name, and our scheme for it.

    ``embeddings``: whether embedding and output layer are quantized too.
    """

    name: str
    scheme: Scheme
    embeddings: bool = True

    @property
    def is_awq(self) -> bool:
        """Whether matrices are stored as AWQ stores them, with zero points."""
        return not self.scheme.weight.symmetric

    @property
    def group(self) -> int:
        """The weights along the input that share a scale."""
        return self.scheme.tile.in_

    @property
    def in_word(self) -> int:
        """The codes in a word of 32 bits."""
        return WORD_BITS // self.scheme.weight.bits

    def words(self, columns: int) -> int:
        """The words of a row."""
        return ceil(columns / self.group) * self.group // self.in_word

    def holds(self, grid: Grid, tile: Tile) -> bool:
        """Whether every weight of this grid and tile can be held exactly, but for the rounding of its scale."""
        own = self.scheme.weight
        if self.is_awq:
            return grid == own and tile.out == 1 and tile.in_ > 0 and tile.in_ % self.group == 0
        if grid.zero is Zero.REAL:
            return False
        fits = grid.bits <= own.bits if grid.symmetric else grid.steps <= -own.qmin
        return fits and (tile.in_ == FULL or tile.in_ % self.group == 0)

    def may_hold(self, weight: QTensor) -> bool:
        """Whether a weight may keep its codes, as far as can be told without its data (``placed``)."""
        if weight.grid.zero is Zero.REAL or (weight.outlier_index is not None and weight.outlier_index.numel()):
            return False
        if self.is_awq:
            return self.holds(weight.grid, weight.tile)
        group = weight.tile.size(weight.shape)[1]
        return weight.grid.bits <= self.scheme.weight.bits and (group == weight.shape[1] or group % self.group == 0)

    def divides(self, columns: int) -> bool:
        """Whether rows of so many weights can be quantized: only AWQ's groups cannot end before they are full."""
        return not self.is_awq or columns % self.group == 0

    def stored(self, name: str, shape: tuple[int, int]) -> dict[str, Shape]:
        """The tensors that a matrix [N, K] is stored as, in the order in which they are written."""
        rows, columns = shape
        if self.is_awq:
            groups, words = columns // self.group, rows // awq.IN_WORD
            shapes = ((columns, words), (groups, words), (groups, rows))
            return {f"{name}.{leaf}": shape for leaf, shape in zip(awq.LEAVES, shapes, strict=True)}
        scales = self.scheme.tile.counts(shape)
        return {f"{name}.q_weight": (rows, self.words(columns)), f"{name}.q_scale": scales}

    def encode(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The tensors of a matrix in this preset's codes."""
        if self.is_awq:
            return awq.encode(name, weight)
        return dict(zip(self.stored(name, weight.shape), (packed(weight, self), weight.scale), strict=True))


PRESETS = tuple(Preset(name.removeprefix("mlc:"), scheme) for name, scheme in [*NAMED.items()][::-1])
"""The presets that quantize everything, few bits first."""
EMBEDDINGS_KEPT = Preset("q4f16_2", NAMED["mlc:q4f16_1"], embeddings=False)
AUTOAWQ = Preset("q4f16_autoawq", Scheme(Grid.integers(4), Tile(1, 128)), embeddings=False)
"""AutoAWQ's layout, which MLC has for Llama alone."""
NAMES = {preset.name: preset for preset in (*PRESETS, EMBEDDINGS_KEPT, AUTOAWQ)}


def placed(weight: QTensor, preset: Preset) -> QTensor | None:
    """The weight in a preset's codes, unchanged; None if they cannot hold it."""
    if weight.grid.zero is Zero.REAL or (weight.outlier_index is not None and weight.outlier_index.numel()):
        return None
    return _in_awq_groups(weight, preset) if preset.is_awq else _turned(weight, preset)


def _in_awq_groups(weight: QTensor, preset: Preset) -> QTensor | None:
    if not preset.holds(weight.grid, weight.tile):
        return None
    cut = split(weight, preset.scheme.tile)
    return None if cut is None else replace(with_scales(cut, torch.float16), outlier_index=None, outlier_value=None)


def _turned(weight: QTensor, preset: Preset) -> QTensor | None:
    """The weight in signed codes, the sign of scale and levels of a group changed if they fit only then."""
    grid, tile = preset.scheme.weight, preset.scheme.tile
    columns, (t_o, t_i) = weight.shape[1], weight.tile.size(weight.shape)
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
    """The weight quantized anew, in a preset's codes of least squared error."""
    grid, tile = preset.scheme.weight, preset.scheme.tile
    parts = []
    for rows in panels((weight.shape[0], weight.shape[1]), tile):
        part = weight[rows].float()
        low, high = fitted(part, grid, tile, torch.float16, alignment=0.0)
        parts.append(quantize_linear(part, LinearDecision(low=low, high=high), preset.scheme, torch.float16))
    return QTensor.of_rows(parts)


def packed(weight: QTensor, preset: Preset) -> Int32[Tensor, "N W"]:
    """Pack codes into words of 32 bits, the first of a word in its lowest bits.

    No code lies in two words; what is left of a word, and of the last group, is 0.
    """
    (rows, columns), bits, words = weight.shape, weight.grid.bits, preset.words(weight.shape[1])
    stored = torch.zeros(rows, words, dtype=torch.int32)
    for part in panels((rows, columns), weight.tile):
        codes = (weight.codes[part] - weight.grid.qmin).to(torch.int32)
        codes = torch.nn.functional.pad(codes, (0, words * preset.in_word - columns))
        for place, code in enumerate(codes.view(len(codes), words, preset.in_word).unbind(2)):
            stored[part] |= code << place * bits
    return stored


def unpacked(words: Int32[Tensor, "R W"], preset: Preset, columns: int) -> Int8[Tensor, "R K"]:
    """Unpack rows of words that ``packed`` makes, into levels from -off to off + 1."""
    grid, codes = preset.scheme.weight, torch.empty(*words.shape, preset.in_word, dtype=torch.int8)
    for place in range(preset.in_word):
        codes[:, :, place] = (words >> place * grid.bits) & grid.steps
    return codes.view(len(words), -1)[:, :columns] + grid.qmin


def lost(name: str, weight: Tensor, quantized: QTensor, fresh: bool = True) -> Difference:
    """What a weight lost that was quantized anew; ``fresh`` if it had no codes before."""
    error = SquaredError()
    for rows in row_panels(weight.shape):
        error.add(weight[rows].float(), rows_of(quantized, rows).dequantize(torch.float32))
    return Difference(name, False, error.relative, fresh)


def rounded(weight: Tensor) -> float:
    """The relative squared error, |W - half(W)|^2 / |W|^2, of a tensor in float16."""
    error = SquaredError()
    for rows in row_panels(weight.shape):
        before = weight[rows].float()
        error.add(before, before.half().float())
    return error.relative
