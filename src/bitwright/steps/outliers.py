"""The outlier decision without data: which weights are kept exactly, since one of them would stretch a whole range."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitwright.core.outlier_rule import Bounds, OutlierRule

TELLING = 1e-15
"""Smaller deviations, and larger than 1 over it, have squares that float32 does not hold well."""
Panels = Callable[[], Iterable[Float[Tensor, "R I"]]]
"""The panels of a weight, once more at each call, on one device."""


@torch.no_grad()
def bounds(panels: Panels, rule: OutlierRule) -> Bounds:
    """What makes an outlier of the weight in these panels.

    By EasyQuant's rule (arXiv 2403.02775, section 3.1) a distance of n standard deviations; else what leaves at most
    the share asked for (less where many lie equally far).
    """
    count, total = 0, 0.0
    for panel in panels():
        count, total = count + panel.numel(), total + float(panel.sum(dtype=torch.float64))
    mean = total / max(1, count)
    if rule.deviations is None:
        return Bounds(mean, _beyond(panels, mean, int(rule.share * count)))
    deviation = _deviation(panels, mean, 1.0)
    if not TELLING < deviation < 1 / TELLING:
        furthest = max(float((panel.float() - mean).abs_().max()) for panel in panels())
        deviation = _deviation(panels, mean, furthest) if furthest else 0.0
    return Bounds(mean, rule.deviations * deviation)


def _deviation(panels: Panels, mean: float, unit: float) -> float:
    """The standard deviation of all weights, from squares that are taken in this unit."""
    count, squares = 0, 0.0
    for panel in panels():
        distance = (panel.float() - mean).div_(unit) if unit != 1 else panel.float() - mean
        count, squares = count + panel.numel(), squares + float(distance.square_().sum(dtype=torch.float64))
    return unit * math.sqrt(squares / max(1, count))


def outliers(weight: Float[Tensor, "O I"], bounds: Bounds) -> Bool[Tensor, "O I"] | None:
    """The weights that these bounds make outliers; None where there are none."""
    distance = (weight.float() - bounds.mean).abs_()
    found = (distance >= bounds.distance) & (distance > 0)  # all weights alike: none of them stands out
    return found if found.any() else None


def _beyond(panels: Panels, mean: float, count: int) -> float:
    """The smallest distance that at most ``count`` weights reach: just above that of the next one."""
    largest = None
    for panel in panels():
        distance = (panel.float() - mean).abs_().flatten()
        distance = distance if largest is None else torch.cat((largest, distance))
        largest = distance.topk(min(count + 1, len(distance)), sorted=True).values
    if largest is None or len(largest) <= count:
        return 0.0
    return float(torch.nextafter(largest[-1], torch.tensor(math.inf, device=largest.device)))
