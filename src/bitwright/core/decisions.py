"""The decisions about a block, as plain data. Methods take decisions and return new ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitwright.core.grid import Tile
from bitwright.core.scheme import Scheme


class Decision(StrEnum):
    """The five decisions, in the order in which ``steps`` applies them."""

    TRANSFORM = "transform"
    OUTLIERS = "outliers"
    AXIS = "axis"
    RANGE = "range"
    ROUNDING = "rounding"


@dataclass(frozen=True)
class SiteDecision:
    """The scale of each free channel C of a site, and the shift if the site can absorb one."""

    scale: Float[Tensor, " C"]
    shift: Float[Tensor, " C"] | None = None


@dataclass(frozen=True)
class LinearDecision:
    """The decisions about one linear; None means not decided yet.

    ``tile`` replaces the scheme's tile (the axis decision). ``low`` and ``high`` are the range of each tile.
    ``outliers`` marks the weights that are kept exactly. ``codes`` are on the scheme's grid.
    """

    tile: Tile | None = None
    low: Float[Tensor, "P Q"] | None = None
    high: Float[Tensor, "P Q"] | None = None
    outliers: Bool[Tensor, "O I"] | None = None
    codes: Int[Tensor, "O I"] | None = None

    def inside(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """The part of a weight that codes stand for: zeros where its outliers are."""
        return weight if self.outliers is None else weight.masked_fill(self.outliers, 0.0)


@dataclass(frozen=True)
class BlockDecisions:
    """Decisions per site and per linear, and every fallback that was taken on the way."""

    sites: Mapping[str, SiteDecision] = field(default_factory=dict)
    linears: Mapping[str, LinearDecision] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()

    def linear(self, name: str) -> LinearDecision:
        """The decisions about a linear; empty if there are none yet."""
        return self.linears.get(name, LinearDecision())

    def tile(self, name: str, scheme: Scheme) -> Tile:
        """The tile decided for a linear, else the scheme's."""
        return self.linear(name).tile or scheme.tile

    def with_sites(self, decided: Mapping[str, SiteDecision]) -> "BlockDecisions":
        """These decisions with some sites' replaced."""
        return replace(self, sites={**self.sites, **decided})

    def with_linears(self, decided: Mapping[str, LinearDecision]) -> "BlockDecisions":
        """These decisions with some linears' replaced."""
        return replace(self, linears={**self.linears, **decided})
