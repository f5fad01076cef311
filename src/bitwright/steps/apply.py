"""Decisions applied in one fixed order: transform, outliers, axis, range, rounding.

What a recipe leaves undecided has a default: the scheme's tile, the min-max range, rounding to nearest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.decisions import LinearDecision
from bitwright.core.qtensor import QTensor, affine, quantize
from bitwright.core.scheme import Scheme
from bitwright.steps.ranges import minmax


def quantize_linear(
    weight: Float[Tensor, "O I"], decision: LinearDecision, scheme: Scheme, scale_dtype: torch.dtype
) -> QTensor:
    """The QTensor that a linear's decisions make of its weight."""
    tile = decision.tile or scheme.tile
    low, high = decision.low, decision.high
    if low is None or high is None:
        low, high = minmax(weight, tile)
    scale, zero = affine(low, high, scheme.weight, scale_dtype)
    codes = decision.codes
    if codes is None:
        codes = quantize(weight, scale, zero, scheme.weight, tile)
    if decision.outliers is None:
        return QTensor(codes, scale, zero, scheme.weight, tile)
    index = decision.outliers.flatten().nonzero().flatten().to(torch.int32)
    return QTensor(codes, scale, zero, scheme.weight, tile, index, weight.flatten()[index.long()])
