"""The transform decision in closed form: scales and shifts that move difficulty from inputs into weights.

With x the inputs of a site's consumers and W their weights, for each free channel j (channels that must share a scale
are one free channel, with the largest of their values; consumers that stay in full precision do not count):

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)        SmoothQuant, arXiv 2211.10438, eq. 4
    delta_j = (max x_j + min x_j) / 2                  Outlier Suppression+, arXiv 2304.09145
    s_j = sqrt(r1_j / r2_j)                            cross-layer equalization, arXiv 1906.04721, eq. 11

The last needs no inputs: r1 is the size of the weights that produce channel j, r2 the size of those that read it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Side, Site
from bitwright.core.method import TOO_FEW, LinearStats
from bitwright.core.weight import starred

SMALLEST, LARGEST = 1e-5, 1e4
Stats = Mapping[str, LinearStats]


def behind_norms(block: Block) -> tuple[Site, ...]:
    """The sites whose scale a norm absorbs: in front of q, k, v, and of the first linears of the MLP."""
    tensors = block.tensors
    gains = {name for name, tensor in tensors.items() if tensor.dim() == 1}
    return tuple(s for s in scalable(block) if f"{s.producers[0].module}.weight" in gains)


def scalable(block: Block) -> tuple[Site, ...]:
    """The sites with linears behind them: all but q.k."""
    return tuple(site for site in block.topology.sites if site.consumers)


def measured(sites: Sequence[Site], stats: Stats) -> tuple[list[Site], list[str]]:
    """The sites whose inputs enough tokens have reached, and words about the others: those of experts."""
    reached = {name for name, inputs in stats.items() if inputs.tokens >= TOO_FEW}
    enough = [s for s in sites if _never_routed(s) or any(side.module in reached for side in s.consumers)]
    return enough, [f"{s.name}: too few tokens reached its expert, no scale" for s in sites if s not in enough]


def _never_routed(site: Site) -> bool:
    return not any("*" in starred(f"{side.module}.") for side in site.consumers)


def of_inputs(site: Site, stats: Stats, value: Callable[[LinearStats], Tensor]) -> Float[Tensor, " C"]:
    """A statistic of the site's inputs for each free channel: the largest value of its channels."""
    return _tied(site, [(side.index, value(stats[side.module])) for side in site.consumers if side.module in stats])


def of_weights(site: Site, block: Block) -> Float[Tensor, " C"]:
    """The largest magnitude of the consumers' weights in each free channel."""
    columns = [(side.index, block.weight(side.module).float().abs().amax(0)) for side in site.consumers]
    return _tied(site, columns)


def balanced(site: Site, block: Block, stats: Stats, alpha: float) -> Float[Tensor, " C"]:
    """The scale of SmoothQuant, on the CPU."""
    x = of_inputs(site, stats, lambda inputs: inputs.absmax).clamp(min=SMALLEST)
    w = of_weights(site, block).clamp(min=SMALLEST)
    return (x.pow(alpha) / w.pow(1 - alpha)).clamp(SMALLEST, LARGEST)


def centred(site: Site, stats: Stats) -> Float[Tensor, " C"] | None:
    """The middle of each channel's range, on the CPU; None if the site cannot absorb a shift."""
    if not site.shift:
        return None
    return (of_inputs(site, stats, lambda inputs: inputs.max) - of_inputs(site, stats, lambda inputs: -inputs.min)) / 2


def equalized(site: Site, block: Block, least: float) -> Float[Tensor, " C"]:
    """The scale that makes producers and consumers equally large, on the CPU.

    It is relative to the median channel's scale, and 1 unless it is at least ``least`` times more or less than that.
    All scales are powers of two, by which every dtype multiplies exactly.
    """
    produced = _tied(site, [(side.index, _size_of_rows(block, side)) for side in site.producers])
    read = _tied(site, [(side.index, block.weight(side.module).float().norm(dim=0)) for side in site.consumers])
    scale = (produced.clamp(min=SMALLEST) / read.clamp(min=SMALLEST)).sqrt()
    power = (scale / scale.median()).log2()
    return torch.exp2(power.round() * (power.abs() >= torch.tensor(least).log2())).clamp(SMALLEST, LARGEST)


def _size_of_rows(block: Block, side: Side) -> Float[Tensor, " C"]:
    """The size of each output channel: the norm of a linear's row, or the gain of a norm."""
    weight = block.tensors[f"{side.module}.weight"].float()
    return weight.norm(dim=1) if weight.dim() == 2 else (weight + side.offset).abs()


def _tied(site: Site, channels: list[tuple[tuple[int, ...] | None, Tensor]]) -> Float[Tensor, " C"]:
    largest = torch.full((site.channels,), -torch.inf)
    for index, values in channels:
        values = values.float().cpu()
        where = torch.arange(site.channels) if index is None else torch.tensor(index)
        largest = largest.scatter_reduce(0, where[where >= 0], values[where >= 0], "amax")
    return largest
