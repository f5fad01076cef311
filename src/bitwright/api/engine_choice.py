"""Whether the engines that a recipe names run it, and in which format: asked before any work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bitwright.api.engine_table import ENGINES, EVERY_BITS, Asked, Engine, Way
from bitwright.api.format_choice import HOLDS_ALL
from bitwright.api.model_limits import ModelLimits
from bitwright.api.source import open_checkpoint, require_folder
from bitwright.core.decisions import Decision
from bitwright.core.errors import RecipeError, nearest
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import FULL, NAMED, Grid, Scheme, Tile
from bitwright.core.settings import settle
from bitwright.methods import compose

GROUPS = (32, 64, 128)
"""Groups that are proposed, beside the scheme's own, those that an engine names, and whole channels."""
CHANNEL = 2**16
"""What a channel counts as beside groups."""


def for_engines(recipe: Recipe, device: str = "auto") -> Recipe:
    """The recipe with the first format that every engine it names loads, and that takes the model's linears.

    Where they all load the format that holds everything, the choice stays open until the methods have decided, as it
    does without engines. Raises RecipeError, before any work, where an engine is not known, does not run what is asked,
    or loads another format, and where the model does not fit into those that are loaded.
    """
    if recipe.engines is None:
        return recipe
    engines = [_named(name) for name in recipe.patterns("engines")]
    if not engines:
        raise RecipeError(f"engines names none; take {', '.join(engine.name for engine in ENGINES)}, or leave it out")
    asked, limits = _asked(recipe), ModelLimits(recipe, device)
    formats = [_formats(engine, asked, recipe.format, limits) for engine in engines]
    if recipe.format is None and all(HOLDS_ALL in those for those in formats):
        return recipe
    shared = [format for format in formats[0] if all(format in others for others in formats)]
    if not shared:
        raise _no_shared_format(engines, formats, asked)
    reasons = dict[str, str]()
    for format in shared:
        why = limits.refuse(asked.scheme, format)
        if why is None:
            return replace(recipe, format=format)
        reasons[format] = why
    raise _model_does_not_fit(engines, reasons, asked, recipe, limits)


def _no_shared_format(engines: Sequence[Engine], formats: Sequence[Sequence[str]], asked: Asked) -> RecipeError:
    loads = "; ".join(f"{engine.name} {', '.join(of)}" for engine, of in zip(engines, formats, strict=True))
    other = next(i for i, those in enumerate(formats) if formats[0][0] not in those)
    return RecipeError(
        f"no one format of scheme {asked.scheme} is loaded by all of these engines ({loads}). Quantize with --engine "
        f"{engines[0].name}, and make {engines[other].name}'s of the result: bitwright export OUTPUT --format "
        f"{formats[other][0]} --output OTHER"
    )


def _model_does_not_fit(
    engines: Sequence[Engine], reasons: Mapping[str, str], asked: Asked, recipe: Recipe, limits: ModelLimits
) -> RecipeError:
    names, those = " and ".join(engine.name for engine in engines), ", ".join(reasons)
    ways = [[way for way in engine.ways if recipe.format in (None, way.format)] for engine in engines]
    able = [engine.name for engine in engines if recipe.format is None and _holds_all(engine, asked)]
    alone = f", or --engine {able[0]} alone, in format {HOLDS_ALL}" if able else ""
    return RecipeError(
        f"{names} cannot run {recipe.model} under scheme {asked.scheme}: what is loaded is format {those}, and "
        f"{'; '.join(dict.fromkeys(reasons.values()))}. {_remedy(ways, asked, limits)}{alone}; bitwright engines shows "
        "the table"
    )


def _holds_all(engine: Engine, asked: Asked) -> bool:
    return any(way.format == HOLDS_ALL and way.refuses(asked) is None for way in engine.ways)


def _named(name: str) -> Engine:
    found = {engine.name: engine for engine in ENGINES}
    if name not in found:
        raise RecipeError(f"there is no engine '{name}'; {nearest(name, found)}. bitwright engines shows them")
    return found[name]


def _asked(recipe: Recipe) -> Asked:
    """What a recipe asks of an engine. Raises UserError where model, scheme, method or settings are none."""
    require_folder(Path(recipe.model))
    model_type = str(open_checkpoint(Path(recipe.model)).config.get("model_type"))
    scheme, methods = Scheme.parse(recipe.scheme), compose(recipe.settled_method)
    settings = settle(recipe.training, scheme, recipe.seed, recipe.settings)
    decides = any(Decision.OUTLIERS in method.decides for method in methods)
    tiles = [tile for method in methods for tile in method.tiles(scheme, settings)]
    return Asked(scheme, model_type, decides and settings.outlier_rule is not None, tiles)


def _formats(engine: Engine, asked: Asked, format: str | None, limits: ModelLimits) -> list[str]:
    """The formats in which an engine runs this. Raises RecipeError with the nearest scheme where there is none."""
    ways = [way for way in engine.ways if format in (None, way.format)]
    if not ways:
        known = ", ".join(dict.fromkeys(way.format for way in engine.ways))
        raise RecipeError(f"{engine.name} does not load format {format}; it loads {known}. Leave --format out")
    reasons = [(way.format, way.refuses(asked)) for way in ways]
    if running := [name for name, reason in reasons if reason is None]:
        return running
    why = "; ".join(dict.fromkeys(f"in {name} it does not run {reason}" for name, reason in reasons))
    method = " with this method" if asked.outliers or asked.tiles else ""
    raise RecipeError(
        f"{engine.name} cannot run scheme {asked.scheme}{method}: {why}. {_remedy([ways], asked, limits)}; "
        "bitwright engines shows the table"
    )


def _remedy(engines: Sequence[Sequence[Way]], asked: Asked, limits: ModelLimits) -> str:
    """What to try: the nearest scheme, and the flags without which the method would ask for more than it."""
    near, why = _nearest(engines, asked, limits)
    if near is None:
        return "No scheme helps" + (f": {why}" if why else "")
    able = [[way for way in ways if way.refuses(Asked(near, asked.model_type)) is None] for ways in engines]
    flags = ["--outliers 0"] if asked.outliers and not all(any(w.outliers for w in ways) for ways in able) else []
    flags += ["--axis oc"] if asked.tiles and not all(any(w.per_input for w in ways) for ways in able) else []
    runs = "It runs" if len(engines) == 1 else "They run"
    near_is = f"The nearest scheme that {'it runs' if len(engines) == 1 else 'they run'} is {near}"
    return (f"{runs} this scheme" if near == asked.scheme else near_is) + (f" with {' '.join(flags)}" if flags else "")


def _nearest(engines: Sequence[Sequence[Way]], asked: Asked, limits: ModelLimits) -> tuple[Scheme | None, str | None]:
    """The scheme least unlike this one that all engines run, in a format that takes the model's linears: activations
    first to stay, then bits, groups and symmetry. None with the reason where the model is what speaks against the
    nearest."""
    first = None
    for near in sorted(_others(asked.scheme, engines), key=lambda other: _unlike(asked.scheme, other)):
        for format in _shared(engines, Asked(near, asked.model_type)):
            why = limits.refuse(near, format)
            if why is None:
                return near, None
            first = first or f"the nearest would be {near}, and {why}"
    return None, first


def _shared(engines: Sequence[Sequence[Way]], asked: Asked) -> list[str]:
    """The formats in which all of them run this."""
    formats = [[way.format for way in ways if way.refuses(asked) is None] for ways in engines]
    return [format for format in formats[0] if all(format in others for others in formats)]


def _others(scheme: Scheme, engines: Sequence[Sequence[Way]]) -> Iterator[Scheme]:
    yield scheme
    theirs = {size for ways in engines for way in ways for size in way.groups or ()}
    sizes = sorted({*GROUPS, *theirs, FULL, _size(scheme.tile)})
    for bits, symmetric, size in product(EVERY_BITS, (False, True), sizes):
        for activations in {(scheme.activation_bits, scheme.kv_bits), (None, None)}:
            yield Scheme(Grid(bits, symmetric), Tile(1, size), *activations)
    yield from NAMED.values()


def _size(tile: Tile) -> int:
    """Weights that share a scale, along whichever dimension; FULL where it is a channel."""
    return FULL if tile.in_ == FULL else max(tile.out, tile.in_)


def _unlike(scheme: Scheme, other: Scheme) -> tuple[float, ...]:
    """In how much two schemes differ, what matters most first; more bits are nearer than fewer."""
    bits = other.weight.bits - scheme.weight.bits
    mine, others = (size if size > 0 else CHANNEL for size in (_size(scheme.tile), _size(other.tile)))
    return (
        (scheme.activation_bits, scheme.kv_bits) != (other.activation_bits, other.kv_bits),
        abs(bits) + (0.5 if bits < 0 else 0),
        other.weight.signed_scale != scheme.weight.signed_scale,
        abs(mine - others),
        other.weight.symmetric != scheme.weight.symmetric,
    )
