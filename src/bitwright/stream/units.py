"""Units: the tensors of a checkpoint that are journaled, and sent to a worker, at once."""

import re
from dataclasses import dataclass, replace

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.weight import Division, Weight

UNIT_BYTES = 64 * 2**20
"""The size up to which tensors of a block are joined into one unit; a single tensor may be larger."""
_BLOCK = re.compile(r"^(.*?(?:^|\.)\d+)\.")


@dataclass(frozen=True)
class Unit:
    """Tensors of one block, or one tensor outside of the blocks, that become one part: some quantized, some copied.

    ``name`` identifies the unit, ``block`` is the block whose report it goes into. ``file`` is the part, ``nbytes`` the
    number of bytes that are read.
    """

    name: str
    block: str
    weights: tuple[Weight, ...]
    copied: tuple[str, ...]
    nbytes: int
    file: str = ""


def units(division: Division, checkpoint: Checkpoint) -> list[Unit]:
    """Divide a checkpoint into units: copied tensors outside of the blocks, then the blocks, then an output layer."""
    whole = [Unit(k.tensor, k.tensor, (), (k.tensor,), checkpoint.nbytes(k.tensor)) for k in division.kept]
    outside = [unit for unit in whole if block_of(unit.name) is None]
    blocks: dict[str, list[Unit]] = {}
    for weight in division.weights:
        block = block_of(weight.name) or weight.name
        single = Unit(weight.name, block, (weight,), (), checkpoint.nbytes(weight.tensor))
        blocks.setdefault(block, []).append(single)
    for unit in whole:
        block_of_kept = block_of(unit.name)
        if block_of_kept is not None:
            blocks.setdefault(block_of_kept, []).append(replace(unit, block=block_of_kept))
    inside = sorted(blocks, key=lambda block: block_of(f"{block}.") is None)  # stable: an output layer comes last
    return outside + [unit for block in inside for unit in _joined(block, blocks[block])]


def block_of(name: str) -> str | None:
    """The block that a tensor belongs to: its name up to the first number; None outside of the blocks."""
    match = _BLOCK.match(name)
    return None if match is None else match[1]


def _joined(block: str, singles: list[Unit]) -> list[Unit]:
    """Join units of single tensors up to UNIT_BYTES each."""
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
