"""The outlier decision without data: keep weights exactly if they would stretch a whole range."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitwright.core.grid import Tile
from bitwright.core.outlier_rule import Bounds, OutlierRule
from bitwright.core.panels import panels

TELLING = 1e-15
"""The smallest deviation whose square float32 holds well; the largest is 1 over it."""
Panels = Callable[[], Iterable[Float[Tensor, "R I"]]]
"""A function whose every call yields the panels of a weight, on one device."""


def bounds_of(
    weight: Float[Tensor, "O I"], tile: Tile, rule: OutlierRule | None, device: str | torch.device | None = None
) -> Bounds | None:
    """The bounds for a whole weight, read in panels that cut no tile; None if there is no rule."""
    if rule is None:
        return None
    rows = panels((weight.shape[0], weight.shape[1]), tile)
    return bounds(lambda: (weight[here].to(device or weight.device) for here in rows), rule)


@torch.no_grad()
def bounds(parts: Panels, rule: OutlierRule) -> Bounds:
    """The bounds beyond which values are outliers, for a weight in panels.

    The distance from the mean is n standard deviations (EasyQuant, arXiv 2403.02775, section 3.1), or the least that
    makes at most the given share of the weights outliers (fewer if many weights are equally far).
    """
    count, total = 0, 0.0
    for panel in parts():
        count, total = count + panel.numel(), total + float(panel.sum(dtype=torch.float64))
    mean = total / max(1, count)
    if rule.deviations is None:
        return Bounds(mean, _beyond(parts, mean, int(rule.share * count)))
    deviation = _deviation(parts, mean, 1.0)
    if not TELLING < deviation < 1 / TELLING:
        furthest = max(float((panel.float() - mean).abs_().max()) for panel in parts())
        deviation = _deviation(parts, mean, furthest) if furthest else 0.0
    return Bounds(mean, rule.deviations * deviation)


def _deviation(parts: Panels, mean: float, unit: float) -> float:
    """The standard deviation of all weights; ``unit`` scales them before they are squared."""
    count, squares = 0, 0.0
    for panel in parts():
        distance = (panel.float() - mean).div_(unit) if unit != 1 else panel.float() - mean
        count, squares = count + panel.numel(), squares + float(distance.square_().sum(dtype=torch.float64))
    return unit * math.sqrt(squares / max(1, count))


def outliers(weight: Float[Tensor, "O I"], bounds: Bounds) -> Bool[Tensor, "O I"] | None:
    """The weights beyond these bounds; None if there are none."""
    distance = (weight.float() - bounds.mean).abs_()
    beyond = (distance >= bounds.distance) & (distance > 0)  # if all weights are equal, none is an outlier
    return beyond if beyond.any() else None


def _beyond(parts: Panels, mean: float, count: int) -> float:
    """The smallest distance that at most ``count`` weights reach: just above the next weight's."""
    largest = None
    for panel in parts():
        distance = (panel.float() - mean).abs_().flatten()
        distance = distance if largest is None else torch.cat((largest, distance))
        largest = distance.topk(min(count + 1, len(distance)), sorted=True).values
    if largest is None or len(largest) <= count:
        return 0.0
    return float(torch.nextafter(largest[-1], torch.tensor(math.inf, device=largest.device)))
