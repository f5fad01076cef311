"""The contract of a method: which decisions it takes, with which settings, and how.

A method is a file in ``methods/`` whose ``METHOD`` is ``Closed`` (it decides in closed form), ``DataFree`` (from one
weight alone) or ``Learned`` (by training). Each kind is generic over the method's settings dataclass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block, Topology
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision
from bitwright.core.grid import Tile
from bitwright.core.outlier_rule import Bounds, OutlierRule
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.settings import Setting, Settings
from bitwright.core.training import Training

S = TypeVar("S", bound=Settings)
Other = TypeVar("Other", bound=Settings)

Parameters = Mapping[str, Tensor]
"""A block's parameters by their names in the block."""
Range = tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]


@dataclass(frozen=True)
class LinearStats:
    """Statistics of each channel of a linear's input: smallest and largest value, and mean magnitude.

    They are over the calibration tokens of the full-precision path. Linears that read the same tensor share them.
    """

    tokens: int
    min: Float[Tensor, " I"]
    max: Float[Tensor, " I"]
    absmean: Float[Tensor, " I"]

    @property
    def absmax(self) -> Float[Tensor, " I"]:
        """The largest magnitude of each channel."""
        return torch.maximum(-self.min, self.max)


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's input over the calibration tokens, float32.

    x is the input on the full-precision path; x' is what the quantized linear will read, after everything before it
    was quantized as decided so far.
    """

    inputs: Float[Tensor, "I I"]
    """E[x' x'^T]."""
    drift: Float[Tensor, "I I"]
    """E[(x - x') x'^T]; zero if it was not asked for."""
    tokens: int


TOO_FEW = 32
"""Fewer tokens than these say too little about an expert: it gets what needs no calibration data."""


class Inspection(Protocol):
    """A module of the block (an attention, an MLP, a linear), run by itself on calibration tokens."""

    def error(
        self,
        parameters: Parameters,
        scale: Float[Tensor, " I"] | None = None,
        shift: Float[Tensor, " I"] | None = None,
    ) -> float:
        """Mean squared difference of the module's output from its full-precision output.

        It runs with these parameters (by their names in the block) in place of its own, on the input
        (x - shift) / scale, with activations quantized as the scheme says.
        """


class BlockData(Protocol):
    """What calibration data say about a block."""

    @property
    def stats(self) -> Mapping[str, LinearStats]:
        """Statistics of every linear's input, by its name in the block. The first use costs a forward pass."""

    def moments(self, linear: str, decisions: BlockDecisions, *, drift: bool) -> Moments:
        """The second moments of what a linear will read, with everything before it quantized as decided."""

    def inspect(self, linears: Sequence[str], enclosing: str, decisions: BlockDecisions, tokens: int) -> Inspection:
        """The module that encloses linears, on at most so many tokens as the quantized blocks before produce them.

        It is the linears themselves if ``enclosing`` is empty, or one of them. The part of the block in front of them
        is transformed as decided and in full precision.
        """


@dataclass(frozen=True)
class Context(Generic[S]):
    """What a method sees besides the block.

    ``allocation`` has the schemes of the block's linears. ``scale_dtype`` is the dtype that scales are stored in.
    ``data`` is None without calibration data, and for the output layer.
    """

    settings: S
    allocation: Allocation
    scale_dtype: torch.dtype
    seed: int = 0
    data: BlockData | None = None

    def scheme(self, linear: str) -> Scheme:
        """The scheme of a linear that is quantized, by its name in the block."""
        return self.allocation.scheme(linear)

    def with_settings(self, settings: Other) -> "Context[Other]":
        """The context of another method, which has settings of its own."""
        return Context(settings, self.allocation, self.scale_dtype, self.seed, self.data)


@dataclass(frozen=True)
class WeightContext(Generic[S]):
    """What a data-free method sees besides a weight, which may be some rows of a larger one.

    ``scheme`` is that of the weight. ``tiles`` are those that the method may choose beside the scheme's own.
    ``outliers`` are the bounds beyond which values of the whole weight are outliers, None if it keeps none.
    """

    settings: S
    scheme: Scheme
    scale_dtype: torch.dtype
    tiles: tuple[Tile, ...] = ()
    outliers: Bounds | None = None


class Measured(Protocol):
    """The second moments of a linear's input, measured when they are asked for."""

    def __call__(self, *, drift: bool) -> Moments:
        """With or without E[(x - x') x'^T]."""


class Learnable:
    """What a learned method hands the trainer: parameters, and how they stand in for the block's weights.

    The parameters are float32 leaves; each group has its learning rate. The defaults change nothing. ``refines`` says
    whether ``refine`` is to be called after training.
    """

    refines: bool = False

    def __init__(self, groups: Mapping[str, tuple[Mapping[str, Tensor], float]]) -> None:
        """``groups``: name -> (parameters by name, learning rate)."""
        self.groups = groups

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters, by ``group/name``: those of the groups, or views of them."""
        return {f"{group}/{name}": p for group, (tensors, _) in self.groups.items() for name, p in tensors.items()}

    def transform(self, parameters: Parameters) -> Parameters:
        """The block's parameters as this method transforms them; differentiable. A step begins with it."""
        return parameters

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range | None:
        """The range of each tile of a (transformed) weight; None if this method decides no ranges."""
        return None

    def refine(self, linear: str, weight: Float[Tensor, "O I"], moments: Measured) -> None:
        """Set the parameters of one linear once more, in closed form. ``weight`` is its transformed weight."""

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The decisions that the learned values amount to. ``parameters`` are the block's, transformed."""
        return decisions


@dataclass(frozen=True)
class Freedom:
    """What a method may give a linear that its scheme does not say.

    ``tiles`` replace the scheme's tile: where that is better for a linear if they are ``compared``, else everywhere.
    ``outliers`` says which weights are kept exactly.
    """

    tiles: tuple[Tile, ...] = ()
    compared: bool = True
    outliers: OutlierRule | None = None


@dataclass(frozen=True)
class Unneeded:
    """Why a method is left out, what a user does to keep it, and which method works if no other is left."""

    why: str
    to_keep: str
    instead: str


def _no_freedom(scheme: Scheme, settings: Any) -> Freedom:
    return Freedom()


def _always_needed(scheme: Scheme, topology: Topology, asked: Mapping[str, Any]) -> Unneeded | None:
    return None


def _never(settings: Any) -> bool:
    return False


def _nothing(settings: Any) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class _Kind(Generic[S]):
    """What methods of every kind say of themselves.

    ``summary`` is a line for help texts. ``decides`` are its decisions; ``starts_from`` those that it improves on if
    they are taken already. ``freedom`` raises SchemeError if the scheme fixes what the method is to choose.
    ``unneeded`` tells from the scheme, the architecture and the recipe's settings whether the method is left out.
    """

    summary: str
    settings: type[S]
    decides: frozenset[Decision]
    starts_from: frozenset[Decision] = frozenset()
    freedom: Callable[[Scheme, S], Freedom] = _no_freedom
    unneeded: Callable[[Scheme, Topology, Mapping[str, Any]], Unneeded | None] = _always_needed
    needs_text: bool = False

    def declared(self) -> Mapping[str, Setting]:
        """The settings that a recipe may give if it has this method, by their keys."""
        return self.settings.declared()


@dataclass(frozen=True, kw_only=True)
class Closed(_Kind[S]):
    """A method in closed form: from a block and what is decided so far to new decisions."""

    decide: Callable[[Block, Context[S], BlockDecisions], BlockDecisions]


@dataclass(frozen=True, kw_only=True)
class DataFree(_Kind[S]):
    """A method that needs one float32 weight alone, and what is decided about it: no calibration data, no block.

    It may be given a weight [O, I] or some of its rows, cut between tiles (``core/panels.py``), unless it has a
    ``freedom`` of tiles.
    """

    decide: Callable[[Tensor, WeightContext[S], LinearDecision], LinearDecision]


@dataclass(frozen=True, kw_only=True)
class Learned(_Kind[S]):
    """A method that is trained, jointly with the learned methods beside it in a recipe.

    ``closed`` says whether, under these settings, its learnables are also set in closed form, so that training may be
    left out. ``shape`` names the settings that decide which parameters there are; saved ones fit the same shape only.
    """

    learn: Callable[[Block, Context[S], BlockDecisions], Learnable]
    closed: Callable[[S], bool] = _never
    shape: Callable[[S], str] = _nothing
    needs_text: bool = True

    def declared(self) -> Mapping[str, Setting]:
        """Its own settings, and those of training."""
        return {**Training.declared(), **self.settings.declared()}


Method = Closed[Any] | DataFree[Any] | Learned[Any]
