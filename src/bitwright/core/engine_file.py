"""What an engine's own file holds, read back: the terms in which formats answer whoever looks at one.

Names of tensors are two: the file's own, and those of the folder that the file was, or could have been, made of.
Letters: O output features, I input features, R rows of a part, G groups of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.qtensor import MINIMUM, QTensor

Rows = slice | Int[Tensor, " R"]
"""Which rows of a tensor of the folder."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineTensor:
    """A tensor under the file's own name: its shape [O, I] in weights, its type there, its bytes."""

    name: str
    shape: Shape
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Wanted:
    """What an architecture's file has to hold, by the file's names, and what it may hold besides."""

    needed: Mapping[str, Shape]
    allowed: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Levels:
    """Rows of a weight as they lie there: ``W = level * step``, plus ``minimum`` where there is one, per group."""

    levels: Int[Tensor, "R I"]
    step: Float[Tensor, "R G"]
    minimum: Float[Tensor, "R G"] | None
    group: int


class EngineFile(Protocol):
    """A file (or a folder of shards) that an engine loads, opened: what it says of itself has been read, and fits."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """What it holds, by its own names."""

    @property
    def wanted(self) -> Wanted | None:
        """What its architecture needs; None where that is not known."""

    @property
    def unknown(self) -> str:
        """Why ``wanted`` is None."""

    @property
    def names(self) -> Sequence[str]:
        """The folder's tensors that can be had from it; none where the architecture is not known."""

    @property
    def misfiled(self) -> str | None:
        """What is wrong with its files, their length first of all; None for nothing."""

    def numbers(self, name: str) -> str | None:
        """What is wrong with scales or values of a tensor under the file's name; None for nothing."""

    def is_read(self, name: str) -> bool:
        """Whether the type of a tensor under the file's name is one whose numbers are looked at."""

    def checksums(self) -> list[str] | None:
        """What is unlike the checksums that come with it, all bytes being read; None where there are none."""

    def bits(self) -> tuple[int, int]:
        """Bits that are stored for the linears of the blocks, and how many weights these have."""

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """Settings of the model that are not those of a config.json. Raises RecipeError for another architecture."""

    def shape(self, name: str) -> Shape:
        """Of a tensor of the folder."""

    def values(self, name: str) -> Iterator[tuple[Rows, Float[Tensor, "R I"]]]:
        """A tensor of the folder in float32, as the engine computes it, some rows at a time.

        Raises CheckpointError for a type that cannot be decoded.
        """

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """The same before it is computed; ends at once where the type has no levels."""


def unlike(weight: QTensor, rows: Rows, found: Levels) -> str | None:
    """In what these rows of a weight are not the levels and scales found, bit by bit; None: in nothing.

    A group may be there with levels and scale of the other sign. Scales are compared as float16.
    """
    columns, (t_o, t_i) = weight.shape[1], weight.tile.size(weight.shape)
    groups = torch.arange(0, columns, found.group) // t_i
    scale = weight.scale.repeat_interleave(t_o, 0)[rows][:, groups].to(found.step.dtype)
    same = found.step == scale
    if not bool((same | (found.step == -scale)).all()):
        return "scales"
    codes, zero = weight.codes[rows].to(torch.int16), None
    if weight.zero is not None:
        zero = weight.zero.repeat_interleave(t_o, 0)[rows]
    if found.minimum is not None:
        if zero is None or not torch.equal(found.minimum, _minimum(zero[:, groups], scale)):
            return "minima"
    else:
        if zero is not None:
            codes -= zero.to(torch.int16)[:, torch.arange(columns) // t_i]
        codes *= torch.where(same, 1, -1).to(torch.int16).repeat_interleave(found.group, 1)[:, :columns]
    return None if torch.equal(codes, found.levels.to(torch.int16)) else "codes"


def _minimum(zero: Tensor, scale: Tensor) -> Tensor:
    """The minimum as it is stored: a real one as it is, else that of an integer zero point."""
    return (zero if zero.is_floating_point() else -zero.float() * scale.float()).to(MINIMUM)
