"""What a run with calibration data finds in a model: groups of linears that share an input, and sites."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bitwright.core.block import Side, Site
from bitwright.model.anatomy import BlockAnatomy
from bitwright.model.source import Source
from bitwright.prepare.block_way import subject_of


@dataclass(frozen=True)
class SiteFound:
    """A site by its names: ``channels`` are its free scales. ``shift`` says whether it can absorb a shift too."""

    name: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    shift: bool


@dataclass(frozen=True)
class BlockInside:
    """Blocks that are alike inside; names are relative to the block.

    ``groups`` are the linears that read one input, in the order in which data flows. ``kept`` are the other matrices,
    by why they stay as they are.
    """

    blocks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    sites: tuple[SiteFound, ...]
    kept: dict[str, tuple[str, ...]]


def look_inside(source: Source) -> tuple[BlockInside, ...]:
    """Look into the blocks of an original model; one of each kind is run. Raises UserError."""
    kinds: dict[object, BlockInside] = {}
    for block in subject_of(source, "cpu").anatomy.blocks:
        inside = _inside(block)
        key = repr(replace(inside, blocks=()))
        known = kinds.get(key)
        kinds[key] = inside if known is None else replace(known, blocks=(*known.blocks, block.name))
    return tuple(kinds.values())


def _inside(block: BlockAnatomy) -> BlockInside:
    kept: dict[str, tuple[str, ...]] = {}
    for tensor, why in block.kept.items():
        kept[why] = (*kept.get(why, ()), tensor.removeprefix(f"{block.name}."))
    groups = tuple(group.linears for group in block.topology.groups)
    return BlockInside((block.name,), groups, tuple(map(_site, block.topology.sites)), kept)


def _site(site: Site) -> SiteFound:
    return SiteFound(site.name, _modules(site.producers), _modules(site.readers), site.channels, site.shift)


def _modules(sides: Iterable[Side]) -> tuple[str, ...]:
    return tuple(side.module for side in sides)
