"""The transform decision: apply a site's scale and shift to the weights on both sides (OmniQuant, eq. 3 to 5).

    producers (norm weights, or the rows of a linear):  W <- W / s,   b <- (b - delta) / s
    readers (the columns of a linear):                  W <- W * s,   b <- b + W delta

The block's output does not change. One function serves training (it is differentiable in scale and shift) and folding.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Side, Site

Parameters = Mapping[str, Tensor]


def apply_site(
    parameters: Parameters, site: Site, scale: Float[Tensor, " C"], shift: Float[Tensor, " C"] | None = None
) -> dict[str, Tensor]:
    """Apply a site's scale and shift to a block's parameters, which go by their names in the block.

    ``scale`` and ``shift`` hold one value for each free channel of the site. Raises ValueError for a shift that the
    site cannot absorb.
    """
    if shift is not None and not site.shift:
        raise ValueError(f"site {site.name} cannot absorb a shift")
    moved = dict(parameters)
    for side in site.producers:
        moved |= _produce(moved, side, spread(scale, side), None if shift is None else spread(shift, side, 0.0))
    for side in site.readers:
        moved |= _consume(moved, side, spread(scale, side), None if shift is None else spread(shift, side, 0.0))
    return moved


def _produce(parameters: Parameters, side: Side, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    weight, bias = parameters[f"{side.module}.weight"], parameters.get(f"{side.module}.bias")
    factor = scale if side.reciprocal else 1 / scale
    moved = {f"{side.module}.weight": weight * (factor if weight.ndim == 1 else factor[:, None])}
    if side.offset:
        moved[f"{side.module}.weight"] = (weight + side.offset) * factor - side.offset
    if bias is not None:
        moved[f"{side.module}.bias"] = (bias if shift is None else bias - shift) * factor
    elif shift is not None:
        raise ValueError(f"{side.module} has no bias to take a shift")
    return moved


def _consume(parameters: Parameters, side: Side, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    weight = parameters[f"{side.module}.weight"]
    moved = {f"{side.module}.weight": weight * scale}
    if shift is not None:
        moved[f"{side.module}.bias"] = parameters[f"{side.module}.bias"] + weight @ shift
    return moved


def spread(values: Float[Tensor, " C"], side: Side, none: float = 1.0) -> Tensor:
    """Spread the values of a site's free channels over the channels of a side; one without gets ``none``."""
    if side.index is None:
        return values
    index = torch.tensor(side.index, device=values.device)
    return torch.cat([values, values.new_full((1,), none)])[index] if -1 in side.index else values[index]
