"""A checkpoint in units: what is journaled, and handed to a worker, at once."""

import re
from dataclasses import dataclass, replace

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.weight import Division, Weight

UNIT_BYTES = 64 * 2**20
"""A block with more is made of several; a single tensor may have more."""
_BLOCK = re.compile(r"^(.*?(?:^|\.)\d+)\.")


@dataclass(frozen=True)
class Unit:
    """Tensors of one block, or one tensor outside of the blocks, that become one part: some quantized, some copied.

    ``name`` tells it apart, ``block`` is whose account it goes into; ``file`` is the part, ``nbytes`` what is read.
    """

    name: str
    block: str
    weights: tuple[Weight, ...]
    copied: tuple[str, ...]
    nbytes: int
    file: str = ""


def units(division: Division, checkpoint: Checkpoint) -> list[Unit]:
    """All tensors of a checkpoint in units: what is copied outside of the blocks, the blocks, an output layer."""
    whole = [Unit(k.tensor, k.tensor, (), (k.tensor,), checkpoint.nbytes(k.tensor)) for k in division.kept]
    outside = [unit for unit in whole if block_of(unit.name) is None]
    blocks: dict[str, list[Unit]] = {}
    for weight in division.weights:
        block = block_of(weight.name) or weight.name
        one = Unit(weight.name, block, (weight,), (), checkpoint.nbytes(weight.tensor))
        blocks.setdefault(block, []).append(one)
    for unit in whole:
        around = block_of(unit.name)
        if around is not None:
            blocks.setdefault(around, []).append(replace(unit, block=around))
    inside = sorted(blocks, key=lambda block: block_of(f"{block}.") is None)  # stable: an output layer comes last
    return outside + [unit for block in inside for unit in _joined(block, blocks[block])]


def block_of(name: str) -> str | None:
    """The block that a tensor belongs to: its name up to the first number."""
    match = _BLOCK.match(name)
    return None if match is None else match[1]


def _joined(block: str, singles: list[Unit]) -> list[Unit]:
    """Units of single tensors joined up to UNIT_BYTES each."""
    groups: list[list[Unit]] = [[]]
    for single in singles:
        if groups[-1] and sum(unit.nbytes for unit in groups[-1]) + single.nbytes > UNIT_BYTES:
            groups.append([])
        groups[-1].append(single)
    names = [block] if len(groups) == 1 else [f"{block} ({n}/{len(groups)})" for n in range(1, len(groups) + 1)]
    return [
        Unit(
            name,
            block,
            tuple(weight for unit in group for weight in unit.weights),
            tuple(name for unit in group for name in unit.copied),
            sum(unit.nbytes for unit in group),
        )
        for name, group in zip(names, groups, strict=True)
    ]
