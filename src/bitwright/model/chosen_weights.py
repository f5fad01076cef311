"""Divide tensors into weights and kept tensors by a user's patterns and transformers' view of the model."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import RecipeError
from bitwright.core.recipe import Recipe
from bitwright.core.weight import Division, Kept, Weight
from bitwright.model.discover import HEADS, discover, head, hidden_size, in_order, weight
from bitwright.model.view import ModelView

SHOWN = 3
LEFT_OUT = "left out by --allocation"
"""Why a linear is kept that an allocation file leaves in full precision."""


@dataclass(frozen=True)
class Patterns:
    """Name patterns with ``*`` and ``?``, as ``--include`` and ``--exclude`` take them.

    ``left_out`` are the linears that an allocation leaves in full precision; names that the model lacks are skipped.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    left_out: frozenset[str] = frozenset()

    @classmethod
    def of(cls, recipe: Recipe, left_out: frozenset[str] = frozenset()) -> "Patterns":
        """The patterns of a recipe."""
        return cls(recipe.patterns("include"), recipe.patterns("exclude"), left_out)


def by_rules(checkpoint: Checkpoint) -> Division:
    """Divide a checkpoint by names and shapes alone, whatever the architecture."""
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    floating = [name for name, entry in entries.items() if entry.dtype.is_floating_point]
    return discover({name: entry.shape for name, entry in entries.items()}, floating, checkpoint.config)


def chosen(division: Division, patterns: Patterns, checkpoint: Checkpoint, view: ModelView | None) -> Division:
    """Apply patterns to a division; what is excluded wins over what is included.

    Tensors that are no linears in transformers' view are kept. Raises RecipeError for a pattern that fits no tensor, or
    a tensor that cannot be quantized.
    """
    weights = {w.name: w for w in division.weights}
    kept = {k.tensor: k for k in division.kept}
    if view is not None:
        _keep(weights, kept, _no_linears(division.weights, view), "no linear in the model that transformers makes")
    shapes = {name: checkpoint.entry(name).shape for name in checkpoint.names}
    for pattern in patterns.include:
        fitting = _fitting(pattern, checkpoint.names, "--include")
        matrices = [name for name in fitting if len(shapes[name]) in (2, 3)]
        for name in matrices or fitting:  # biases beside them stay as they are
            if name in kept:
                _require_matrix(name, pattern, checkpoint, view)
                weights[name.removesuffix(".weight")] = weight(name, shapes, hidden_size(checkpoint.config))
                del kept[name]
    for pattern in patterns.exclude:
        linears = {f"{w.name}.weight": w for w in weights.values()}  # a tied output layer has a name and no tensor
        names = set(_fitting(pattern, [*checkpoint.names, *linears], "--exclude"))
        gone = [w for name, w in linears.items() if w.tensor in names or name in names]
        _keep(weights, kept, gone, f"excluded by {pattern}")
    _keep(weights, kept, [w for w in weights.values() if w.name in patterns.left_out], LEFT_OUT)
    order = {name: at for at, name in enumerate(in_order(checkpoint.names))}
    before = set(division.weights)
    added = [w for w in weights.values() if w not in before]
    in_place = [w for w in division.weights if w.name in weights]
    ordered = sorted([*in_place, *added], key=lambda w: order[w.tensor]) if added else in_place
    return Division(tuple(ordered), tuple(sorted(kept.values(), key=lambda k: order[k.tensor])))


def _no_linears(weights: Iterable[Weight], view: ModelView) -> list[Weight]:
    """Single matrices that have a place in the model but are no linear's weight there."""
    alone = [w for w in weights if not (w.stacked or w.transposed or w.name == "lm_head")]
    alone = [w for w in alone if view.places.get(w.tensor) == w.tensor]
    return [w for w in alone if view.linear(w.tensor) is None]


def _keep(weights: dict[str, Weight], kept: dict[str, Kept], gone: list[Weight], why: str) -> None:
    for left_out in gone:
        del weights[left_out.name]
        kept[left_out.tensor] = Kept(left_out.tensor, why)


def _fitting(pattern: str, names: Iterable[str], flag: str) -> list[str]:
    fitting = [name for name in names if _fits(name, pattern)]
    if not fitting:
        if flag == "--include" and head(names) is None and any(_fits(f"{name}.weight", pattern) for name in HEADS):
            raise RecipeError(
                f"--include {pattern}: the checkpoint has no tensor for its output layer, which is the embedding too; "
                "--quantize-lm-head quantizes a copy of it"
            )
        close = get_close_matches(pattern, list(names), n=SHOWN, cutoff=0.3)
        hint = f"; near it: {', '.join(close)}" if close else ""
        raise RecipeError(f"{flag} {pattern} fits no tensor of the checkpoint{hint}; * stands for any text, dots too")
    return fitting


def _fits(name: str, pattern: str) -> bool:
    return any(fnmatchcase(n, pattern) for n in (name, name.removesuffix(".weight")))


def _require_matrix(name: str, pattern: str, checkpoint: Checkpoint, view: ModelView | None) -> None:
    entry = checkpoint.entry(name)
    why = None
    if not entry.dtype.is_floating_point:
        why = f"holds {str(entry.dtype).removeprefix('torch.')}"
    elif len(entry.shape) not in (2, 3):
        why = f"has shape {list(entry.shape)}: a linear has two dimensions, a stack of experts three"
    elif 0 in entry.shape:
        why = f"is empty: its shape is {list(entry.shape)}"
    elif len(entry.shape) == 3 and 1 in entry.shape[1:]:
        why = f"has shape {list(entry.shape)}: no stack of experts, each would be a vector"
    elif len(entry.shape) == 2 and not name.endswith(".weight"):
        why = "is no linear's weight, or its name would end in .weight: nothing could load it packed"
    elif view is not None and view.linear(name) is None and view.places.get(name) == name and len(entry.shape) == 2:
        why = "is no linear in the model that transformers makes, which could not load it packed"
    if why:
        raise RecipeError(f"--include {pattern} fits {name}, which {why}; name the tensors more exactly")
