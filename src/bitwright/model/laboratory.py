"""A block that is run in float64 with changed tensors, to see what reads a channel, and whether its output changes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bitwright.core.block import Layout, Side, Site
from bitwright.core.weight import starred
from bitwright.model.calls import Call
from bitwright.model.recording import Recording, record
from bitwright.steps.transform import apply_site

CLOSE, EXACT = 1e-4, 1e-5
"""Relative differences: of equal values, although a part of the block may compute in float32; and of ratios."""
ROUNDS = 4
"""Products that hang on others' outcome, such as an expert on its router, are made good for one round later."""


@dataclass(frozen=True)
class Laboratory:
    """A block that is run in float64 with changed tensors; ``rows`` are the inputs of its products, in their order."""

    module: nn.Module
    layout: Layout
    call: Call
    parameters: Mapping[str, Tensor]
    owners: Mapping[tuple[str, int | None], tuple[str, ...]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The block's own tensors, by their names in it."""
        return self.layout.tensors(self.parameters)

    def run(self, tensors: Mapping[str, Tensor]) -> "Run":
        """Run the block with these tensors in place of its own."""
        changed = self.layout.parameters(tensors, self.parameters)
        return Run.of(record(self.module, self.call, {**self.parameters, **changed}), self.owners)


@dataclass(frozen=True)
class Run:
    """The output of a block, and the inputs of its products, with the linears that read each."""

    output: Tensor
    products: tuple[tuple[tuple[str, ...], Tensor], ...]

    @classmethod
    def of(cls, recording: Recording, owners: Mapping[tuple[str, int | None], tuple[str, ...]]) -> "Run":
        """Read a recording; ``owners`` are the linears by parameter and expert."""
        products = list[tuple[tuple[str, ...], Tensor]]()
        for product in recording.products:
            factor, x = product.factor, product.inputs
            indices = range(len(x)) if factor.index is None and x.dim() == 3 and (factor.parameter, 0) in owners else ()
            for index in indices or (factor.index,):
                products.append((owners.get((factor.parameter, index), ()), x[index] if indices else x))
        return cls(recording.output, tuple(products))


Readers = dict[str, tuple[int, ...]]
"""The scale of each input channel of a linear, by the linear's name; -1 for none."""


def laboratory(module: nn.Module, layout: Layout, call: Call) -> Laboratory:
    """Prepare a block, with the weights that it has, for one of its calls."""
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    owners: dict[tuple[str, int | None], list[str]] = {}
    for name, parameter in layout.names.items():
        if name.endswith(".weight"):
            owners.setdefault((parameter, None), []).append(name.removesuffix(".weight"))
    for linear, places in layout.linears.items():
        for place in places:
            owners.setdefault((place.parameter, place.index), []).append(linear)
    known = {key: tuple(dict.fromkeys(names)) for key, names in owners.items()}
    double = call.map(lambda t: t.double() if t.is_floating_point() else t)
    return Laboratory(module, layout, double, parameters, known)


def site_of(producers: tuple[Side, ...], readers: Readers, channels: int) -> Site:
    """The site between producers and what reads their channels; it has no name yet."""
    identity = tuple(range(channels))
    consumers = tuple(Side(name, None if index == identity else index) for name, index in readers.items())
    return Site("", producers, consumers, channels)


def readers_of(lab: Laboratory, base: Run, producers: tuple[Side, ...], channels: int) -> Readers | None:
    """What reads the channels of producers, and nothing else does; None if there is no such thing."""
    scale, readers = scales(channels, 2), Readers()
    for _ in range(ROUNDS):
        run = lab.run(apply_site(lab.tensors, site_of(producers, readers, channels), scale))
        fresh = _fresh_readers(base, run, readers, scale)
        if fresh is None:
            return None
        if not fresh:
            return readers if readers and proven(lab, base, site_of(producers, readers, channels)) else None
        readers |= _with_unreached(fresh, lab)
    return None


def _with_unreached(readers: Readers, lab: Laboratory) -> Readers:
    """Readers, and the experts beside them that no token reached."""
    stars = {starred(f"{name}."): index for name, index in readers.items()}
    names = dict.fromkeys(name for owned in lab.owners.values() for name in owned)
    return readers | {name: stars[star] for name in names if (star := starred(f"{name}.")) in stars and "*" in star}


def _fresh_readers(base: Run, run: Run, readers: Readers, scale: Tensor) -> Readers | None:
    """Products whose inputs have changed by the scales; None if others have changed, and none of these."""
    fresh, others_changed = Readers(), False
    for (linears, x0), (now, x1) in zip(base.products, run.products, strict=False):
        if linears != now or x0.shape != x1.shape:
            others_changed = True
            break
        if (linears and linears[0] in readers) or close(x0, x1):
            continue
        index = index_of(x0, x1, scale) if linears else None
        if index is None:
            others_changed = True
        else:
            fresh |= dict.fromkeys(linears, index)
    return None if others_changed and not fresh else fresh


def index_of(x0: Tensor, x1: Tensor, scale: Tensor) -> tuple[int, ...] | None:
    """The scale by which each channel was divided, -1 for none; None if one was changed in another way."""
    x0, x1 = x0.reshape(-1, x0.shape[-1]), x1.reshape(-1, x1.shape[-1])
    if not len(x0):
        return None
    size = x0.abs().amax(0)
    alive = size > 1e-9 * size.max()
    ratio = (x0 * x0).sum(0) / (x0 * x1).sum(0)
    fits = ((x1 * ratio - x0).abs().amax(0) <= CLOSE * size) | ~alive
    if not bool(fits.all()):
        return None
    known, order = torch.cat([scale, scale.new_ones(1)]).sort()
    ratio = torch.where(alive & (ratio > 0), ratio, 1.0)
    above = torch.searchsorted(known, ratio).clamp(max=len(known) - 1)
    below = (above - 1).clamp(min=0)
    near = torch.where((known[above] - ratio).abs() < (known[below] - ratio).abs(), above, below)
    if not bool((((known[near] / ratio) - 1).abs() <= EXACT)[alive].all()):
        return None
    index = order[near]
    index = torch.where(index == len(scale), -1, index)
    if not bool(alive.all()):
        identity = torch.arange(len(index))
        if len(index) != len(scale) or not bool((index == identity)[alive].all()):
            return None
        index = identity
    return tuple(index.tolist())


def proven(lab: Laboratory, base: Run, site: Site, shift: Tensor | None = None) -> bool:
    """Whether the block's output stays what it is under other scales, or under a shift."""
    scale = scales(site.channels, 3) if shift is None else torch.ones(site.channels, dtype=torch.float64)
    run = lab.run(apply_site(lab.tensors, replace(site, shift=True), scale, shift))
    return close(base.output, run.output)


def scales(channels: int, seed: int) -> Tensor:
    """Scales from a half to two, all different, in a random order."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    return torch.exp2(torch.linspace(-1, 1, channels, dtype=torch.float64)[order] * (0.97 if channels > 1 else 1))


def close(left: Tensor, right: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if left.shape != right.shape or not left.numel():
        return left.shape == right.shape
    return bool((left - right).abs().max() <= CLOSE * left.abs().max())
