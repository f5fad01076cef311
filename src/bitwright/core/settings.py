"""Settings of methods.

Each is declared once, as a field of the settings dataclass in its method's file:

    damping: float = setting(0.01, "share of the mean diagonal that is added to the Hessian's", above=0, most=1)

Recipe keys, command-line options and their help are derived from these fields.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import inf, isfinite
from typing import Any, Generic, Self, TypeVar, get_args, get_type_hints

from bitwright.core.errors import RecipeError, nearest
from bitwright.core.registry import modules
from bitwright.core.scheme import Scheme

T = TypeVar("T")

PRESETS = ("bitwright", "paper")
"""``bitwright`` is what we found to work best; ``paper`` the plain settings of the papers."""

ESTABLISHED = (
    *("epochs", "batch_size", "lwc_lr", "let_lr", "aug_loss", "alpha", "schedule", "precision", "sites", "refine"),
    *("drift", "axis", "damping", "act_order", "outliers", "range", "norm", "alignment"),
)
"""The order of settings in files and help. A setting that is not listed comes after these, by its name."""

DECLARED = "declared"
"""The key of a field's metadata under which its declaration stands."""


@dataclass(frozen=True)
class Basis:
    """What the value of a preset may depend on.

    ``closed``: everything that is trained is also searched in closed form afterwards, so that training may be left out.
    """

    scheme: Scheme
    closed: bool = False


@dataclass(frozen=True)
class Depends(Generic[T]):
    """A preset's value that depends on the scheme, and how help texts describe it."""

    shown: str
    value: Callable[[Basis], T]


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    ``kinds`` are the types of its values, ``presets`` its value in each preset. ``wants`` ends the message about a
    number out of bounds. ``parse`` raises RecipeError for text that means nothing. ``number_as_text`` accepts a number
    in a recipe and keeps its text.
    """

    kinds: tuple[type, ...]
    help: str
    presets: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    above: float = -inf
    least: float = -inf
    most: float = inf
    wants: str = ""
    parse: Callable[[str], object] | None = None
    number_as_text: bool = False

    def of(self, preset: str, basis: Basis) -> Any:
        """The value that a preset has under a scheme."""
        value = self.presets[preset]
        return value.value(basis) if isinstance(value, Depends) else value

    def check(self, key: str, value: Any) -> None:
        """Raise RecipeError for a value of the right type that is not allowed."""
        if self.choices and value is not None and value not in self.choices:
            raise RecipeError(f"there is no {key} '{value}'; {nearest(str(value), self.choices)}")
        if self.parse is not None:
            self.parse(value)
        if isinstance(value, (int, float)):
            inside = isfinite(value) and self.least <= value <= self.most and value > self.above
            if not inside:
                raise RecipeError(f"{key} is {value}; {self.wants or self._bounds()}")

    def shown_default(self) -> str:
        """Its value in each preset, for help texts: ``cosine; paper: constant``. Empty if it has none."""
        ours, *others = (_shown(self.presets[preset]) for preset in PRESETS)
        differing = (f"{preset}: {text}" for preset, text in zip(PRESETS[1:], others, strict=True) if text != ours)
        return "; ".join([ours, *differing]) if ours else ""

    def _bounds(self) -> str:
        if self.most == inf:
            return f"it must be more than {self.above}" if self.least == -inf else f"it must be at least {self.least}"
        if self.above >= self.least:
            return f"it is more than {self.above} and at most {self.most}"
        return f"it is between {self.least} and {self.most}"


def setting(
    default: T,
    help: str,
    *,
    bitwright: T | Depends[T] | None = None,
    paper: T | Depends[T] | None = None,
    choices: tuple[str, ...] = (),
    above: float = -inf,
    least: float = -inf,
    most: float = inf,
    wants: str = "",
    parse: Callable[[str], object] | None = None,
    number_as_text: bool = False,
) -> T:
    """A field of a settings dataclass. The presets have the default, unless ``bitwright`` or ``paper`` says otherwise.

    A number must be more than ``above``, and between ``least`` and ``most``. For the rest see ``Setting``.
    """
    presets = {"bitwright": default if bitwright is None else bitwright, "paper": default if paper is None else paper}
    declared = Setting((), help, presets, choices, above, least, most, wants, parse, number_as_text)
    settings_field: T = field(default=default, metadata={DECLARED: declared})
    return settings_field


@dataclass(frozen=True)
class Settings:
    """What one method can be told. This base class is that of a method without settings.

    Raises RecipeError for a value that is not allowed.
    """

    def __post_init__(self) -> None:
        for key, declared in self.declared().items():
            declared.check(key, getattr(self, key))

    @classmethod
    def declared(cls) -> Mapping[str, Setting]:
        """The declarations by key, inherited ones included."""
        declared: Mapping[str, Setting] = _declared(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
        return declared

    @classmethod
    def settled(cls, preset: str, basis: Basis, asked: Mapping[str, Any]) -> Self:
        """A preset's values, replaced by what a recipe asks for. Keys of other methods are skipped.

        Raises RecipeError for an unknown preset, and for values that are not allowed.
        """
        if preset not in PRESETS:
            raise RecipeError(f"there are no training settings '{preset}'; {nearest(preset, PRESETS)}")
        declared = cls.declared()
        own = {key: value for key, value in asked.items() if key in declared}
        settled = cls(**({key: setting.of(preset, basis) for key, setting in declared.items()} | own))
        settled.refuse(basis.scheme, own.keys())
        return settled

    def refuse(self, scheme: Scheme, asked: Collection[str]) -> None:
        """Raise RecipeError if these values contradict the scheme or one another. ``asked`` are a recipe's own keys."""


@dataclass(frozen=True)
class Known:
    """A setting, and the names of the methods that have it."""

    setting: Setting
    methods: tuple[str, ...]


def known_settings() -> dict[str, Known]:
    """Every setting of every method by its key, in the order of files and help. Imports all methods.

    Raises TypeError if two methods declare one key differently.
    """
    known: dict[str, Known] = {}
    for name, module in modules("methods").items():
        for key, declared in module.METHOD.declared().items():
            before = known.get(key, Known(declared, ()))
            if before.setting != declared:
                raise TypeError(f"setting {key}: {name} and {before.methods[0]} declare it differently; share one")
            known[key] = Known(declared, (*before.methods, name))
    return in_order(known)


def in_order(values: Mapping[str, T]) -> dict[str, T]:
    """Values by setting, in the order of files and help."""
    last = len(ESTABLISHED)
    places = {key: place for place, key in enumerate(ESTABLISHED)}
    return {key: values[key] for key in sorted(values, key=lambda key: (places.get(key, last), key))}


@cache
def _declared(settings: type[Settings]) -> Mapping[str, Setting]:
    hints = get_type_hints(settings)
    kinds = {key: get_args(hint) or (hint,) for key, hint in hints.items()}
    return {part.name: replace(part.metadata[DECLARED], kinds=kinds[part.name]) for part in fields(settings)}


def _shown(value: object) -> str:
    """A preset's value in a help text."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else value.shown if isinstance(value, Depends) else str(value)
