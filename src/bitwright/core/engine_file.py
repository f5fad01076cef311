"""The contract of an engine's own file that is read back: what a format answers about one.

Tensors have two names: the file's own, and that in the folder which the file was, or could have been, made of. Letters:
O output features, I input features, R rows of a part, G groups of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.qtensor import MINIMUM, QTensor

Rows = slice | Int[Tensor, " R"]
"""The rows that a part holds of a tensor of the folder."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of the file: its name there, its shape [O, I] in weights, its type there, its bytes."""

    name: str
    shape: Shape
    kind: str
    nbytes: int


@dataclass(frozen=True)
class Wanted:
    """The tensors that an architecture's file must hold, by the file's names, and those that it may hold besides."""

    needed: Mapping[str, Shape]
    allowed: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Levels:
    """Rows of a weight as they are stored: ``W = level * step`` per group, plus ``minimum`` if there is one."""

    levels: Int[Tensor, "R I"]
    step: Float[Tensor, "R G"]
    minimum: Float[Tensor, "R G"] | None
    group: int


class EngineFile(Protocol):
    """An opened file (or folder of shards) that an engine loads; its description of itself is read and consistent."""

    @property
    def path(self) -> Path:
        """The path of the file or folder."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """The tensors in the file, by the file's names."""

    @property
    def wanted(self) -> Wanted | None:
        """The tensors that its architecture needs; None if that is not known."""

    @property
    def unknown(self) -> str:
        """The reason why ``wanted`` is None."""

    @property
    def names(self) -> Sequence[str]:
        """The folder's tensors that can be read from the file; empty if the architecture is not known."""

    @property
    def misfiled(self) -> str | None:
        """The fault of its files, their length first of all; None if there is none."""

    def numbers(self, name: str) -> str | None:
        """The fault of scales or values of a tensor of the file; None if there is none."""

    def is_read(self, name: str) -> bool:
        """Whether the numbers of a tensor of the file are of a type that is looked at."""

    def checksums(self) -> tuple[list[str], list[str]] | None:
        """The files that differ from their checksums, all bytes being read, and those that have none.

        None if the format has no checksums.
        """

    def bits(self) -> tuple[int, int]:
        """The number of bits that are stored for the linears of the blocks, and the number of their weights."""

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """The settings of the model that differ from a config.json. Raises RecipeError for another architecture."""

    def shape(self, name: str) -> Shape:
        """The shape of a tensor of the folder."""

    def values(self, name: str) -> Iterator[tuple[Rows, Float[Tensor, "R I"]]]:
        """A tensor of the folder in float32, as the engine computes it, some rows at a time.

        Raises CheckpointError for a type that cannot be decoded.
        """

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """A tensor's levels and steps, some rows at a time; nothing if its type has no levels."""


@runtime_checkable
class WithSettings(Protocol):
    """An engine's file that also says how the engine computes with its tensors."""

    def impossible(self) -> list[str]:
        """The settings that the engine cannot compute with, or computes no numbers with, in words."""

    @property
    def unread(self) -> str:
        """What the file holds beside tensors and settings that is not looked at, in words; "" if there is nothing."""


def unlike(weight: QTensor, rows: Rows, stored: Levels) -> str | None:
    """The part of these rows of a weight, in a word, that differs from the stored levels; None if none does.

    The comparison is bit by bit. A group may be stored with levels and scale of the other sign. Scales are compared as
    float16.
    """
    columns, (t_o, t_i) = weight.shape[1], weight.tile.size(weight.shape)
    groups = torch.arange(0, columns, stored.group) // t_i
    scale = weight.scale.repeat_interleave(t_o, 0)[rows][:, groups].to(stored.step.dtype)
    same = stored.step == scale
    if not bool((same | (stored.step == -scale)).all()):
        return "scales"
    codes, zero = weight.codes[rows].to(torch.int16), None
    if weight.zero is not None:
        zero = weight.zero.repeat_interleave(t_o, 0)[rows]
    if stored.minimum is not None:
        if zero is None or not torch.equal(stored.minimum, _minimum(zero[:, groups], scale)):
            return "minima"
    elif zero is not None and zero.is_floating_point():
        return "minima"
    else:
        if zero is not None:
            codes -= zero.to(torch.int16)[:, torch.arange(columns) // t_i]
        codes *= torch.where(same, 1, -1).to(torch.int16).repeat_interleave(stored.group, 1)[:, :columns]
    return None if torch.equal(codes, stored.levels.to(torch.int16)) else "codes"


def _minimum(zero: Tensor, scale: Tensor) -> Tensor:
    """The minimum as it is stored: a real one as it is, else that of an integer zero point."""
    return (zero if zero.is_floating_point() else -zero.float() * scale.float()).to(MINIMUM)
