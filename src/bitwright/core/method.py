"""The contract of a method: which decisions it takes, and how: in closed form, data-free, or by training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision, LinearDecision
from bitwright.core.grid import Tile
from bitwright.core.outlier_rule import Bounds
from bitwright.core.scheme import Scheme
from bitwright.core.settings import Settings

Parameters = Mapping[str, Tensor]
"""A block's parameters by their names in the block."""
Range = tuple[Float[Tensor, "P Q"], Float[Tensor, "P Q"]]


@dataclass(frozen=True)
class Activations:
    """A block's inputs: on the full-precision path, and as the already quantized blocks produce them."""

    reference: Float[Tensor, "N T D"]
    quantized: Float[Tensor, "N T D"]


@dataclass(frozen=True)
class LinearStats:
    """Smallest and largest value and mean magnitude of each channel of a linear's input, over the calibration tokens
    of the full-precision path. Linears that share an input share them."""

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
    """Second moments of a linear's input over the calibration tokens, float32: x as the full-precision path gives it,
    x' as the quantized linear will read it, with everything before it quantized as decided so far."""

    inputs: Float[Tensor, "I I"]
    """E[x' x'^T]"""
    drift: Float[Tensor, "I I"]
    """E[(x - x') x'^T]"""


class Inspection(Protocol):
    """A module of the block (an attention, an MLP, a linear) on calibration tokens, beside itself in full precision."""

    def error(
        self,
        parameters: Parameters,
        scale: Float[Tensor, " I"] | None = None,
        shift: Float[Tensor, " I"] | None = None,
    ) -> float:
        """Mean squared difference of its output with these parameters (by their names in the block) in the place of its
        own, its input x taken as (x - shift) / scale, and activations quantized as the scheme says."""


@dataclass(frozen=True)
class Context:
    """What a method sees besides the block: the scheme, the dtype scales are stored in, and the calibration data.

    ``moments`` measures what a linear reads once everything before it is quantized as decided. ``inspect`` shows a
    module, by its name in the block, on the quantized blocks' output, in front of it the block transformed as decided
    and in full precision, on so many tokens at most. Both are None without text.

    A data-free method may be given a weight in panels of whole rows, one after the other; ``bounds`` are then what
    makes an outlier of the whole.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    activations: Activations | None = None
    stats: Mapping[str, LinearStats] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    moments: Callable[[str, BlockDecisions], Moments] | None = None
    inspect: Callable[[str, BlockDecisions, int], Inspection] | None = None
    bounds: Bounds | None = None


class Learnable:
    """What a learned method brings to the trainer: parameters, and how they stand in for the block's weights.

    The parameters are float32 leaves; each group has its learning rate. The defaults change nothing.
    """

    def __init__(self, groups: Mapping[str, tuple[Mapping[str, Tensor], float]]) -> None:
        """``groups``: name -> (parameters by name, learning rate)."""
        self.groups = groups

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters, by ``group/name``; those of a group, or parts of them in the same memory."""
        return {f"{group}/{name}": p for group, (tensors, _) in self.groups.items() for name, p in tensors.items()}

    def transform(self, parameters: Parameters) -> Parameters:
        """The block's parameters as this method transforms them; differentiable. A step begins with it."""
        return parameters

    @property
    def refinable(self) -> bool:
        """Whether ``refine`` does anything."""
        return type(self).refine is not Learnable.refine

    def range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range | None:
        """The range of each tile of a (transformed) weight, or None where this method decides none."""
        return None

    def refine(self, linear: str, weight: Float[Tensor, "O I"], moments: Moments) -> None:
        """The parameters of one linear set once more, in closed form, after training; its weight is transformed."""

    def decide(self, parameters: Parameters, decisions: BlockDecisions) -> BlockDecisions:
        """The decisions that the learned values are; ``parameters`` are the block's, transformed."""
        return decisions


def _no_tiles(scheme: Scheme, settings: Settings) -> tuple[Tile, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """``decides`` what; ``uses`` are the settings it listens to (a learned one beside the trainer's); ``tiles`` those
    it may choose beside the scheme's own; ``starts_from`` are decisions that it changes where they are taken already.
    """

    decides: frozenset[Decision]
    uses: frozenset[str] = frozenset()
    tiles: Callable[[Scheme, Settings], tuple[Tile, ...]] = _no_tiles
    starts_from: frozenset[Decision] = frozenset()
    needs_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Closed(_Kind):
    """A method in closed form: from a block and what is decided so far to new decisions.

    Without ``reads_stats`` the context may come without ``stats``, which cost a forward pass.
    """

    decide: Callable[[Block, Context, BlockDecisions], BlockDecisions]
    reads_stats: bool = False


@dataclass(frozen=True, kw_only=True)
class DataFree(_Kind):
    """A method that needs one weight alone, float32, and what is decided about it: no text, no block.

    It may be given a weight [O, I] or some of its rows, cut between tiles (``core/panels.py``), unless it ``tiles``.
    """

    decide: Callable[[Tensor, Context, LinearDecision], LinearDecision]


@dataclass(frozen=True, kw_only=True)
class Learned(_Kind):
    """A method that is trained, jointly with the learned methods beside it in a recipe.

    ``refines`` says that its learnables set their parameters in closed form too, for which training may be left out.
    """

    learn: Callable[[Block, Context, BlockDecisions], Learnable]
    needs_text: bool = True
    refines: bool = False


Method = Closed | DataFree | Learned
