"""What has been decided about a block so far. Methods take decisions and return new ones."""

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
    """Scale, and where the site can absorb it shift, of each free channel C of a site."""

    scale: Float[Tensor, " C"]
    shift: Float[Tensor, " C"] | None = None


@dataclass(frozen=True)
class LinearDecision:
    """What is decided about one linear; None is not decided yet.

    ``tile`` replaces the scheme's tile (the axis decision). ``low`` and ``high`` are the range of each tile.
    ``outliers`` marks the weights kept exactly. ``codes`` are on the scheme's grid.
    """

    tile: Tile | None = None
    low: Float[Tensor, "P Q"] | None = None
    high: Float[Tensor, "P Q"] | None = None
    outliers: Bool[Tensor, "O I"] | None = None
    codes: Int[Tensor, "O I"] | None = None

    def inside(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """What codes stand for: the weight, with zeros where its outliers are."""
        return weight if self.outliers is None else weight.masked_fill(self.outliers, 0.0)


@dataclass(frozen=True)
class BlockDecisions:
    """Decisions per site and per linear, and every fallback that was taken on the way."""

    sites: Mapping[str, SiteDecision] = field(default_factory=dict)
    linears: Mapping[str, LinearDecision] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()

    def linear(self, name: str) -> LinearDecision:
        """What is decided about a linear, nothing if nothing is."""
        return self.linears.get(name, LinearDecision())

    def tile(self, name: str, scheme: Scheme) -> Tile:
        """The tile decided for a linear, the scheme's where none is."""
        return self.linear(name).tile or scheme.tile

    def with_sites(self, decided: Mapping[str, SiteDecision]) -> "BlockDecisions":
        """These decisions with some sites' replaced."""
        return replace(self, sites={**self.sites, **decided})

    def with_linears(self, decided: Mapping[str, LinearDecision]) -> "BlockDecisions":
        """These decisions with some linears' replaced."""
        return replace(self, linears={**self.linears, **decided})
