"""What the user asked for: the same keys as flags, in Python, and in a YAML file."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from bitwright.core.errors import RecipeError, nearest, shown
from bitwright.core.registry import compose, require_name
from bitwright.core.scheme import Scheme, schemes_for
from bitwright.core.settings import PRESETS, known_settings

PLACES = ("model", "calibration", "allocation", "load_parameters", "base")
"""Keys whose values are paths, in a text or as a Path."""
PATTERNS = ("include", "exclude", "engines")
SETTINGS = "settings"
"""The attribute that holds settings; in files and on the command line each is a key of its own."""
SHARD_SIZE = "5GB"
MOST = 10**100
"""More than any number that is meant; a number of thousands of digits cannot even be printed."""


@dataclass(frozen=True, init=False)
class Recipe:
    """Everything that decides the bytes of the result. Unknown keys are refused.

    ``method`` None is ``omniquant`` if calibration data is named, else ``rtn``. ``format`` None is
    ``compressed-tensors`` if every linear fits into it, else ``bitwright``. ``seqlen`` None is 2048 tokens, or the
    model's own maximum if that is shorter. ``calibration`` names one source of text, or several with their shares:
    ``a.jsonl:2,b.txt:1``; ``text_field`` is the field of their rows, if it is another one than ``messages``,
    ``conversations`` or ``text``. ``all_experts`` shows every calibration token to every expert, not only to those that
    it is routed to. ``include`` and ``exclude`` are patterns of names, in a list or with
    commas between them; ``include`` is for methods that need no calibration data. ``scheme_for`` gives linears a
    scheme of their own: ``PATTERN=SCHEME``, in a list, with commas between them, or as a mapping. ``allocation`` is
    a file that says the scheme of every linear, such as each run writes; then ``scheme`` may be None. ``engines``,
    written like patterns, is what the result shall run on. ``embeddings`` and ``base`` are for formats made of a
    finished folder. ``training`` names the preset of the methods' settings.

    Any other keyword is a setting of some method, such as ``epochs=5``: it is kept in ``settings``, and read as an
    attribute. None leaves it to the preset.
    """

    model: str
    scheme: str | None
    method: str | None
    format: str | None
    calibration: str | None
    text_field: str | None
    all_experts: bool
    samples: int
    seqlen: int | None
    seed: int
    quantize_lm_head: bool
    shard_size: str
    training: str
    settings: Mapping[str, Any] = field(hash=False)
    include: str | list[str] | tuple[str, ...] | None
    exclude: str | list[str] | tuple[str, ...] | None
    scheme_for: str | list[str] | tuple[str, ...] | dict[str, str] | None
    allocation: str | None
    load_parameters: str | None
    engines: str | list[str] | tuple[str, ...] | None
    embeddings: str | None
    base: str | None

    def __init__(
        self,
        model: str | os.PathLike[str],
        scheme: str | None = None,
        method: str | None = None,
        format: str | None = None,
        calibration: str | os.PathLike[str] | None = None,
        samples: int = 128,
        seqlen: int | None = None,
        seed: int = 0,
        quantize_lm_head: bool = False,
        shard_size: str = SHARD_SIZE,
        training: str = "bitwright",
        *,
        text_field: str | None = None,
        all_experts: bool = False,
        include: str | list[str] | tuple[str, ...] | None = None,
        exclude: str | list[str] | tuple[str, ...] | None = None,
        scheme_for: str | list[str] | tuple[str, ...] | dict[str, str] | None = None,
        allocation: str | os.PathLike[str] | None = None,
        load_parameters: str | os.PathLike[str] | None = None,
        engines: str | list[str] | tuple[str, ...] | None = None,
        embeddings: str | None = None,
        base: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """Raise RecipeError for an unknown key, and for a value of the wrong type, out of bounds, or not known."""
        given = {key: value for key, value in locals().items() if key not in ("self", SETTINGS)}
        for key, value in given.items():
            if key in PLACES and isinstance(value, os.PathLike):
                value = os.fsdecode(value)
            _require_kind(key, value, _KINDS[key])
            _require_texts(key, value)
            value = [f"{name}={text}" for name, text in value.items()] if isinstance(value, dict) else value
            joined = ",".join(map(str, value)) or None if isinstance(value, (list, tuple)) else value
            object.__setattr__(self, key, joined)
        if scheme is None and allocation is None:
            raise RecipeError(_missing("scheme"))
        object.__setattr__(self, SETTINGS, _asked(settings.pop(SETTINGS, {}) | settings))
        _ = self.shard_bytes
        if calibration == "":
            raise RecipeError("calibration is empty; name a text file or folder, mix, or leave it out")
        if text_field is not None and (calibration is None or not text_field):
            raise RecipeError(
                f"text_field '{text_field}' names a field of the rows of the calibration data"
                + ("; it is empty" if calibration else ", and none were named; give --calibration FILE")
            )
        for key, number, least in (("samples", samples, 1), ("seqlen", seqlen, 1), ("seed", seed, 0)):
            if number is not None and not least <= number < MOST:
                limit = f"at least {least}" if number < least else "less than 10^100"
                raise RecipeError(f"{key} is {shown(number)}; it must be {limit}")
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        """Raise RecipeError, or SchemeError, for a scheme, method, format, engine or preset that is none."""
        if self.scheme is not None:
            Scheme.parse(self.scheme)
        tuple(schemes_for(self.patterns("scheme_for")))
        if self.method is not None:
            compose(self.method)
        if self.format is not None:
            require_name("formats", self.format)
        if self.engines is not None:
            from bitwright.core.engine import engine_named  # it imports torch

            tuple(map(engine_named, self.patterns("engines")))
        if self.training not in PRESETS:
            raise RecipeError(f"there are no training settings '{self.training}'; {nearest(self.training, PRESETS)}")

    def __getattr__(self, key: str) -> Any:
        """A method's setting as it was asked for; None if it was not."""
        if key.startswith("_") or key == SETTINGS:  # looked up by copy and pickle before there are settings
            raise AttributeError(key)
        if key not in self.settings and key not in known_settings():
            raise AttributeError(f"a recipe has no key '{key}'; {nearest(key, self.keys())}")
        return self.settings.get(key)

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """All keys in the order in which they are written, settings in the place of ``settings``."""
        names = [[*known_settings()] if key.name == SETTINGS else [key.name] for key in fields(cls)]
        return tuple(name for several in names for name in several)

    def changed(self, **changes: Any) -> "Recipe":
        """This recipe with some keys changed, settings included: ``recipe.changed(scheme="W3A16", epochs=5)``."""
        return replace(self, **changes)

    def patterns(self, key: str) -> tuple[str, ...]:
        """The patterns of ``include``, ``exclude`` or ``scheme_for``, or the names of ``engines``, one by one."""
        return tuple(part.strip() for part in (getattr(self, key) or "").split(",") if part.strip())

    @property
    def shard_bytes(self) -> int:
        """The size in bytes above which the result is split. Raises RecipeError for a text that is no size."""
        return size_in_bytes(self.shard_size, "shard size")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """A recipe from parsed YAML or JSON. Raises RecipeError for a key that is unknown or missing."""
        written, known = {str(key).replace("-", "_"): value for key, value in mapping.items()}, cls.keys()
        for key in written:
            if key not in known:
                raise RecipeError(f"a recipe has no key '{key}'; {nearest(key, known)}")
        if written.get("model") is None:
            raise RecipeError(_missing("model"))
        return cls(**written)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by ``keys()``, as written into bitwright.json; None for a setting that was not asked for."""
        values = {key: getattr(self, key) for key in _KINDS if key != SETTINGS} | dict(self.settings)
        return {key: values.get(key) for key in self.keys()}


def _missing(key: str) -> str:
    return f"the recipe does not say which {key}: give --{key} or the key '{key}' in the recipe"


def _kinds(hint: Any) -> tuple[type, ...]:
    return tuple(get_origin(kind) or kind for kind in get_args(hint) or (hint,))


_KINDS = {key: _kinds(hint) for key, hint in get_type_hints(Recipe).items()}


def _asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not None. Raises RecipeError for a key that no method has, or a value of another type."""
    known, asked = known_settings(), {}
    for key, value in settings.items():
        if key not in known:
            raise RecipeError(f"a recipe has no key '{key}'; {nearest(key, Recipe.keys())}")
        setting = known[key].setting
        if setting.number_as_text and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if float in setting.kinds and isinstance(value, str):
            value = _number(value)
        _require_kind(key, value, (*(kind for kind in setting.kinds if kind is not type(None)), type(None)))
        if value is not None:
            asked[key] = value
    return asked


def _require_kind(key: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise RecipeError for a value of another type. A whole number is a float; True is no number."""
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise RecipeError(f"recipe key '{key}' is {shown(value)}; it takes {wanted}")


def _require_texts(key: str, value: Any) -> None:
    """Raise RecipeError for a list, or a mapping of patterns to schemes, in which there is anything but texts."""
    items: Iterable[tuple[Any, ...]] = value.items() if isinstance(value, dict) else ()
    if isinstance(value, (list, tuple)):
        items = [(text,) for text in value]
    wrong = next((item for item in items if not all(isinstance(text, str) for text in item)), None)
    if wrong is None:
        return
    entry = {wrong[0]: wrong[1]} if isinstance(value, dict) else wrong[0]
    if key == "scheme_for":
        way = "write each as a text, - '*.down_proj=W8A16g128', or a mapping without dashes, '*.down_proj': W8A16g128"
    else:
        way = "write a list of texts, - '*.down_proj'"
    raise RecipeError(f"recipe key '{key}' has {shown(entry)} in it; {way}")


def _number(text: str) -> float | str:
    """``1e-2``, which YAML reads as text, as a number; other text unchanged."""
    try:
        return float(text)
    except ValueError:
        return text


_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) *(KB|MB|GB|TB)", re.IGNORECASE)
_FACTORS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(text: object, what: str) -> int:
    """The bytes of a size such as ``500MB``. Raises RecipeError for other text; ``what`` begins the message."""
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not float(match[1]):
        raise RecipeError(f"{what} '{text}' is no size; write a number and a unit: 500MB, 5GB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])
