"""What the user asked for: the same keys as flags, in Python, and in a YAML file."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from bitwright.core.errors import RecipeError, nearest
from bitwright.core.settings import ASKED

PATTERNS = ("include", "exclude", "engines")
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of the result. Keys that are not known are refused.

    ``seqlen`` None is 2048 tokens, or the model's own maximum where that is shorter. ``method`` None is ``omniquant``
    where calibration text is named and ``rtn`` where none is. ``format`` None is ``compressed-tensors`` where every
    linear fits into it and ``bitwright`` where one does not. ``include`` and ``exclude`` are patterns of names, in a
    list or with commas between them, for methods that need no text. ``embeddings`` and ``base`` are for formats made of
    a finished folder, ``engines``, written in the same way, what the result shall run on. ``training`` names the
    preset of the methods' settings; the keys after it are single settings (``core/settings.py``), None is what the
    preset says for the scheme.
    """

    model: str
    scheme: str
    method: str | None = None
    format: str | None = None
    calibration: str | None = None
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    quantize_lm_head: bool = False
    shard_size: str = SHARD_SIZE
    training: str = "bitwright"
    epochs: int | None = None
    batch_size: int | None = None
    lwc_lr: float | None = None
    let_lr: float | None = None
    aug_loss: bool | None = None
    alpha: float | None = None
    schedule: str | None = None
    precision: str | None = None
    sites: str | None = None
    refine: bool | None = None
    drift: bool | None = None
    axis: str | None = None
    damping: float | None = None
    act_order: bool | None = None
    outliers: str | None = None
    range: str | None = None
    norm: float | None = None
    alignment: float | None = None
    include: str | list[str] | tuple[str, ...] | None = None
    exclude: str | list[str] | tuple[str, ...] | None = None
    load_parameters: str | None = None
    engines: str | list[str] | tuple[str, ...] | None = None
    embeddings: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        for key, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, key), tuple(get_origin(kind) or kind for kind in get_args(hint) or (hint,))
            fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
                raise RecipeError(f"recipe key '{key}' is {value!r}; it takes {wanted}")
        for key in PATTERNS:
            if isinstance(patterns := getattr(self, key), (list, tuple)):
                object.__setattr__(self, key, ",".join(map(str, patterns)) or None)
        _ = self.shard_bytes
        if self.calibration == "":
            raise RecipeError("calibration is empty; name a text file or folder, builtin, or leave it out")
        for key, least in (("samples", 1), ("seqlen", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise RecipeError(f"{key} is {value}; it must be at least {least}")

    @property
    def settled_method(self) -> str:
        """The method named, or the default."""
        if self.method is not None:
            return self.method
        return "rtn" if self.calibration is None else "omniquant"

    def patterns(self, key: str) -> tuple[str, ...]:
        """Those of ``include``, ``exclude`` or ``engines``, one by one."""
        return tuple(part.strip() for part in (getattr(self, key) or "").split(",") if part.strip())

    @property
    def settings(self) -> dict[str, Any]:
        """The methods' settings that were asked for; None where the preset decides."""
        return {key: getattr(self, key) for key in ASKED}

    @property
    def shard_bytes(self) -> int:
        """The size in bytes above which the result is split. Raises RecipeError for a text that is no size."""
        return size_in_bytes(self.shard_size, "shard size")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """A recipe from parsed YAML or JSON. Raises RecipeError for a key that is unknown or missing."""
        keys, hints = {field.name for field in fields(cls)}, get_type_hints(cls)
        written = {str(key).replace("-", "_"): value for key, value in mapping.items()}
        for key in written:
            if key not in keys:
                raise RecipeError(f"a recipe has no key '{key}'; {nearest(key, keys)}")
        for key in ("model", "scheme"):
            if written.get(key) is None:
                raise RecipeError(f"the recipe does not say which {key}: give --{key} or the key '{key}' in the recipe")
        return cls(**{key: _as_wanted(key, value, hints) for key, value in written.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written into bitwright.json."""
        return asdict(self)


_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) *(KB|MB|GB|TB)", re.IGNORECASE)
_FACTORS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_in_bytes(text: object, what: str) -> int:
    """Bytes of ``500MB`` or ``5GB``. Raises RecipeError for what is no such text; ``what`` is what it was to be."""
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not float(match[1]):
        raise RecipeError(f"{what} '{text}' is no size; write a number and a unit: 500MB, 5GB")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def _as_wanted(key: str, value: Any, hints: Mapping[str, Any]) -> Any:
    """``1e-2`` as a number where one is wanted, ``outliers: 3`` as text."""
    if key == "outliers" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or float not in get_args(hints[key]):
        return value
    try:
        return float(value)
    except ValueError:
        return value
