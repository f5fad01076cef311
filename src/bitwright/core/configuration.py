"""Methods with their settings: what a recipe and a preset together tell them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from bitwright.core.method import Freedom, Learned, Method
from bitwright.core.scheme import Scheme
from bitwright.core.settings import PRESETS, Basis, Settings, in_order
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
        return "+".join(configured.name for configured in self.methods)

    @property
    def learns(self) -> bool:
        """Whether any method is trained."""
        return self.training is not None

    @property
    def needs_text(self) -> bool:
        """Whether any method needs calibration data."""
        return any(configured.method.needs_text for configured in self.methods)

    def freedoms(self, scheme: Scheme | None = None) -> list[Freedom]:
        """What each method may give a linear of this scheme, or of the default one."""
        return [configured.freedom(scheme or self.scheme) for configured in self.methods]

    @property
    def shape(self) -> str:
        """The settings that decide which parameters are learned; empty if none does."""
        shapes = []
        for configured in self.methods:
            if isinstance(configured.method, Learned):
                shapes.append(configured.method.shape(configured.settings(self.scheme)))
        return ",".join(filter(None, shapes))

    def values(self) -> dict[str, Any]:
        """Every setting by its key, as plain values in the order of files."""
        own: list[Settings] = [configured.settings(self.scheme) for configured in self.methods]
        every = own if self.training is None else [self.training, *own]
        return in_order({field.name: getattr(settings, field.name) for settings in every for field in fields(settings)})
