"""Methods with their settings: what a recipe and a preset together tell them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bitwright.core.method import Freedom, Learned, Method
from bitwright.core.scheme import Scheme
from bitwright.core.settings import PRESETS, Basis, in_order
from bitwright.core.training import Training


@dataclass(frozen=True)
class Configured:
    """One method under its name, with the preset and what a recipe asks for; keys of other methods do not matter."""

    name: str
    method: Method
    preset: str = PRESETS[0]
    asked: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, scheme: Scheme) -> Any:
        """Its settings, an instance of its own dataclass. Raises RecipeError for values that are not allowed."""
        return self.method.settings.settled(self.preset, Basis(scheme), self.asked)

    def freedom(self, scheme: Scheme) -> Freedom:
        """What it may give a linear of this scheme. Raises SchemeError if the scheme fixes what it is to choose."""
        return self.method.freedom(scheme, self.settings(scheme))


@dataclass(frozen=True)
class Configuration:
    """All methods of a recipe in their order, under the model's default scheme.

    ``training`` are the settings of training; None if nothing is learned.
    """

    methods: tuple[Configured, ...]
    scheme: Scheme
    training: Training | None

    @property
    def name(self) -> str:
        """The methods as a recipe names them: ``let+lwc``."""
        return "+".join(each.name for each in self.methods)

    @property
    def learns(self) -> bool:
        """Whether any method is trained."""
        return self.training is not None

    @property
    def needs_text(self) -> bool:
        """Whether any method needs calibration data."""
        return any(each.method.needs_text for each in self.methods)

    def freedoms(self, scheme: Scheme | None = None) -> list[Freedom]:
        """What each method may give a linear of this scheme, or of the default one."""
        return [each.freedom(scheme or self.scheme) for each in self.methods]

    @property
    def shape(self) -> str:
        """The settings that decide which parameters are learned; empty if none does."""
        learned = [(each, each.method) for each in self.methods if isinstance(each.method, Learned)]
        return ",".join(filter(None, (method.shape(each.settings(self.scheme)) for each, method in learned)))

    def values(self) -> dict[str, Any]:
        """Every setting by its key, as plain values in the order of files."""
        told = [*filter(None, [self.training]), *(each.settings(self.scheme) for each in self.methods)]
        return in_order({each.name: getattr(settings, each.name) for settings in told for each in fields(settings)})
