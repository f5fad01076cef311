"""Which scheme each linear has: one for all, or schemes of their own for some of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bitwright.core.scheme import Scheme


@dataclass(frozen=True)
class Allocation:
    """A scheme for every linear of a model.

    ``schemes`` are those of linears that have another one than ``default``, by their names in the model; None leaves a
    linear in full precision. ``asked`` says, for messages, what gave a linear its scheme: an entry of --scheme-for, or
    the file of --allocation.
    """

    default: Scheme
    schemes: Mapping[str, Scheme | None] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict, compare=False)

    def of(self, linear: str) -> Scheme | None:
        """The scheme of a linear; None if it stays in full precision."""
        return self.schemes.get(linear, self.default)

    def scheme(self, linear: str) -> Scheme:
        """The scheme of a linear that is quantized."""
        scheme = self.of(linear)
        assert scheme is not None, f"{linear} is not quantized"
        return scheme

    def asked_by(self, linear: str) -> str:
        """What gave a linear its scheme, as a message goes on after the scheme; nothing if it has that of most."""
        return f" ({self.asked[linear]})" if linear in self.asked else ""

    def within(self, block: str) -> "Allocation":
        """The schemes of a block's linears by their names in the block; "" is the model itself."""
        prefix = f"{block}." if block else ""
        own = {name: scheme for name, scheme in self.schemes.items() if name.startswith(prefix)}
        return Allocation(self.default, {name.removeprefix(prefix): scheme for name, scheme in own.items()})

    @property
    def distinct(self) -> tuple[Scheme, ...]:
        """Every scheme once, the default first."""
        return tuple(dict.fromkeys((self.default, *filter(None, self.schemes.values()))))

    @property
    def own(self) -> dict[str, Scheme]:
        """The schemes of quantized linears that have another one than the default."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme not in (None, self.default)}

    @property
    def uniform(self) -> bool:
        """Whether all quantized linears have one scheme."""
        return not self.own

    def to_json(self, linears: Iterable[str]) -> dict[str, object]:
        """``allocation.json``: ``{"scheme": default, "linears": {name: scheme or null}}`` for these linears."""
        schemes = {linear: self.of(linear) for linear in linears}
        return {
            "scheme": str(self.default),
            "linears": {linear: None if scheme is None else str(scheme) for linear, scheme in schemes.items()},
        }
