"""What comes out of a block, and the account that is given of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bitwright.core.qtensor import QTensor


@dataclass(frozen=True)
class LinearReport:
    """The account of one linear.

    ``bits_per_weight`` counts scales, zeros and outliers. ``weight_error`` is ``|W - Wq|^2 / |W|^2``;
    ``output_error`` is ``|XW' - XWq'|^2 / |XW'|^2`` on the calibration tokens as the full-precision blocks
    produce them, None without calibration text.
    """

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    bits_per_weight: float
    storage_bits: int
    weight_error: float
    output_error: float | None


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
