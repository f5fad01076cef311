"""The methods, one file each: they take the five decisions as their papers do.

A recipe names methods in order, joined by ``+``, or a preset. Orders that cannot work are refused before any weight is
read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.block import Topology
from bitwright.core.configuration import Configuration, Configured
from bitwright.core.decisions import Decision
from bitwright.core.errors import RecipeError, nearest
from bitwright.core.method import DataFree, Learned, Method
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find, modules, names
from bitwright.core.scheme import Scheme
from bitwright.core.settings import PRESETS as SETTINGS_PRESETS
from bitwright.core.settings import Basis, known_settings
from bitwright.core.training import Training

OMNIQUANT = "omniquant"
PRESETS = {OMNIQUANT: "let+lwc"}
WITH_TEXT, WITHOUT_TEXT = OMNIQUANT, "rtn"
"""The methods that are used if a recipe names none: with, and without calibration data."""


@dataclass(frozen=True)
class Composition:
    """Methods by name, in the order in which they work; ``named`` is the recipe's own text."""

    named: str
    methods: Mapping[str, Method]

    @property
    def learns(self) -> bool:
        """Whether any method is trained."""
        return any(isinstance(method, Learned) for method in self.methods.values())

    @property
    def needs_text(self) -> bool:
        """Whether any method needs calibration data."""
        return any(method.needs_text for method in self.methods.values())

    @property
    def data_free(self) -> bool:
        """Whether every method needs one weight alone."""
        return all(isinstance(method, DataFree) for method in self.methods.values())

    def fitted(
        self, scheme: Scheme, topology: Topology | None, asked: Mapping[str, Any]
    ) -> tuple["Composition", str | None]:
        """The methods that are run on an architecture, and a note on those that are left out.

        ``topology`` is None if there are no blocks to transform. ``asked`` are the recipe's own settings.
        """
        reasons = {}
        for name, method in self.methods.items():
            if topology is not None and (unneeded := method.unneeded(scheme, topology, asked)) is not None:
                reasons[name] = unneeded
        if not reasons:
            return Composition("+".join(self.methods), self.methods), None
        left = [name for name in self.methods if name not in reasons] or [next(iter(reasons.values())).instead]
        going_on = "+".join(left)
        notes = [
            f"{name} is left out: {unneeded.why}. Going on with {going_on}; {unneeded.to_keep}"
            for name, unneeded in reasons.items()
        ]
        return compose(going_on), "; ".join(notes)

    def settled(self, preset: str, scheme: Scheme, asked: Mapping[str, Any]) -> Configuration:
        """The methods with their settings: the preset's values, replaced by those that a recipe asks for.

        Raises RecipeError for an unknown preset, for values that are not allowed, and for a setting that no method has.
        """
        if preset not in SETTINGS_PRESETS:
            raise RecipeError(f"there are no training settings '{preset}'; {nearest(preset, SETTINGS_PRESETS)}")
        self._refuse_unused(asked)
        methods = tuple(Configured(name, method, preset, asked) for name, method in self.methods.items())
        settled = {configured.name: configured.settings(scheme) for configured in methods}
        training = None
        if self.learns:
            learned = {name: method for name, method in self.methods.items() if isinstance(method, Learned)}
            closed = all(method.closed(settled[name]) for name, method in learned.items())
            training = Training.settled(preset, Basis(scheme, closed), asked)
        return Configuration(methods, scheme, training)

    def _refuse_unused(self, asked: Mapping[str, Any]) -> None:
        """Raise RecipeError for a setting that would change nothing."""
        own = {key for method in self.methods.values() for key in method.declared()}
        known = known_settings()
        unused = next((key for key in known if key in asked and key not in own), None)
        if unused is not None:
            raise RecipeError(
                f"{'+'.join(self.methods)} has no use for {unused}; leave it out, or take a method that has: "
                f"{', '.join(known[unused].methods)}"
            )


def composed_for(recipe: Recipe) -> Composition:
    """The methods of a recipe, or the default ones if it names none. Raises RecipeError as ``compose`` does."""
    default = WITHOUT_TEXT if recipe.calibration is None else WITH_TEXT
    return compose(default if recipe.method is None else recipe.method)


def compose(text: str) -> Composition:
    """Compose the methods that a text names.

    Raises RecipeError for an unknown name, for two methods that take the same decision, and for an order in which a
    method would take a decision that has to come before one already taken.
    """
    writers: dict[Decision, str] = {}
    methods: dict[str, Method] = {}
    for name in _parts(text):
        method = _named(name)
        for decision in sorted(method.decides, key=_ORDER.index):
            _refuse_conflict(name, method, decision, writers, methods)
        writers |= dict.fromkeys(method.decides, name)
        methods[name] = method
    return Composition(text, methods)


def describe_methods() -> str:
    """Every method with its summary, for help texts, in an order in which methods may follow one another."""
    methods = {name: module.METHOD for name, module in modules("methods").items()}
    ordered = sorted(methods, key=lambda name: (max(map(_ORDER.index, methods[name].decides)), name))
    presets = ", ".join(f"{name} ({meant})" for name, meant in PRESETS.items())
    lines = "; ".join(f"{name}: {methods[name].summary}" for name in ordered)
    default = f"{WITH_TEXT} with calibration data, else {WITHOUT_TEXT}"
    return f"{presets}, or methods joined by + in this order. {lines}. [default: {default}]"


def _parts(text: str) -> list[str]:
    """The names of the methods, with presets replaced by the methods that they stand for."""
    names_given = [part.strip() for part in text.split("+")]
    return [name for given in names_given for name in PRESETS.get(given, given).split("+")]


def _named(name: str) -> Method:
    if name not in names("methods"):
        known = [*names("methods"), *PRESETS]
        raise RecipeError(f"there is no method '{name}'; {nearest(name, known)}")
    method: Method = find("methods", name).METHOD
    return method


_ORDER = list(Decision)


def _refuse_conflict(
    name: str, method: Method, decision: Decision, writers: Mapping[Decision, str], before: Mapping[str, Method]
) -> None:
    """Raise RecipeError if a method cannot take a decision after the methods ``before``."""
    improves = decision in method.starts_from and not isinstance(before.get(writers.get(decision, "")), Learned)
    if decision in writers and not improves:
        raise RecipeError(f"{writers[decision]} and {name} both decide the {decision}; keep one of them")
    later = sorted((d for d in writers if _ORDER.index(d) > _ORDER.index(decision)), key=_ORDER.index)
    if later:
        earlier = writers[later[0]]
        swapped = _can_follow(method, before[earlier])
        raise RecipeError(
            f"{name} decides the {decision}, which comes before the {later[0]} that {earlier} has already decided; "
            + (f"write {name}+{earlier}" if swapped else "they do not go together, keep one of them")
        )


def _can_follow(first: Method, second: Method) -> bool:
    """Whether the second method may come after the first."""
    return max(map(_ORDER.index, first.decides)) < min(map(_ORDER.index, second.decides))
