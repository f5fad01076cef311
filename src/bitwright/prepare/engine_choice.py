"""Whether the engines that a recipe names run it, and in which format: asked before any work."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bitwright.core.decisions import Decision
from bitwright.core.engine import EVERY_BITS, Engine, Refusal, Way, Workload, engine_named, engines
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.recipe import Recipe
from bitwright.core.registry import format_of
from bitwright.core.scheme import NAMED, Scheme
from bitwright.core.settings import settle
from bitwright.methods import compose
from bitwright.model.source import open_checkpoint, require_folder
from bitwright.prepare.format_choice import HOLDS_ALL, is_single
from bitwright.prepare.model_limits import ModelLimits

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
    chosen = [engine_named(name) for name in recipe.patterns("engines")]
    if not chosen:
        raise RecipeError(f"engines names none; take {', '.join(engine.name for engine in engines())}, or leave it out")
    asked, limits = _asked(recipe), ModelLimits(recipe, device)
    ways = [_running(engine, asked, recipe.format, limits) for engine in chosen]
    formats = [list(dict.fromkeys(way.format for way in those)) for those in ways]
    if recipe.format is None and all(HOLDS_ALL in those for those in formats):
        return recipe
    shared = [format for format in formats[0] if all(format in others for others in formats)]
    if not shared:
        raise _no_shared_format(chosen, ways, asked, recipe, limits)
    reasons = dict[str, str]()
    for format in shared:
        why = limits.refuse(asked.scheme, format, _of(format, *ways))
        if why is None:
            return replace(recipe, format=format)
        reasons[format] = why
    raise _model_does_not_fit(chosen, reasons, asked, recipe, limits)


def _of(format: str, *ways: Sequence[Way]) -> list[Way]:
    return [way for those in ways for way in those if way.format == format]


def _no_shared_format(
    engines: Sequence[Engine], ways: Sequence[Sequence[Way]], asked: Workload, recipe: Recipe, limits: ModelLimits
) -> RecipeError:
    """Says how one run serves them all: first what ``export`` reads, then exports of it."""
    fitting, loads = list[str](), list[str]()
    for engine, those in zip(engines, ways, strict=True):
        formats = list(dict.fromkeys(way.format for way in those))
        reasons = {format: limits.refuse(asked.scheme, format, _of(format, those)) for format in formats}
        if all(reasons.values()):
            said = {format: why for format, why in reasons.items() if why is not None}
            return _model_does_not_fit([engine], said, asked, recipe, limits)
        fitting.append(next(format for format, why in reasons.items() if why is None))
        loads.append(f"{engine.name} {', '.join(formats)}")
    first = next((at for at, format in enumerate(fitting) if not isinstance(format_of(format), FileFormat)), None)
    made, begin = (HOLDS_ALL, f"--format {HOLDS_ALL} and no --engine")
    if first is not None:
        made, begin = fitting[first], f"--engine {engines[first].name} alone"
    others = dict.fromkeys(
        fitting[at] for at, those in enumerate(ways) if at != first and made not in {way.format for way in those}
    )
    exports = "; ".join(
        f"bitwright export OUTPUT --format {format} --output OTHER{'.gguf' if is_single(format) else f'-{format}'}"
        for format in others
    )
    return RecipeError(
        f"no one format of scheme {asked.scheme} is loaded by all of these engines ({'; '.join(loads)}). Quantize with "
        f"{begin}, and export the result for the other{'s' if len(others) > 1 else ''}: {exports}"
    )


def _model_does_not_fit(
    engines: Sequence[Engine], reasons: Mapping[str, str], asked: Workload, recipe: Recipe, limits: ModelLimits
) -> RecipeError:
    names, those, said = " and ".join(engine.name for engine in engines), ", ".join(reasons), {*reasons.values()}
    ways = [[way for way in engine.ways if recipe.format in (None, way.format)] for engine in engines]
    able = [engine.name for engine in engines if recipe.format is None and _holds_all(engine, asked)]
    alone = f", or --engine {able[0]} alone, in format {HOLDS_ALL}" if able else ""
    alone += _elsewhere(engines[0], asked, recipe.format, limits) if len(engines) == 1 else ""
    return RecipeError(
        f"{names} cannot run {recipe.model} under scheme {asked.scheme}: what is loaded is format {those}, and "
        f"{'; '.join(dict.fromkeys(reasons.values()))}. {_remedy(ways, asked, limits, said)}{alone}; bitwright engines "
        "shows the table"
    )


def _holds_all(engine: Engine, asked: Workload) -> bool:
    return any(way.format == HOLDS_ALL and way.refusal(asked) is None for way in engine.ways)


def _asked(recipe: Recipe) -> Workload:
    """What a recipe asks of an engine. Raises UserError where model, scheme, method or settings are none."""
    require_folder(Path(recipe.model))
    model_type = str(open_checkpoint(Path(recipe.model)).config.get("model_type"))
    scheme, methods = Scheme.parse(recipe.scheme), compose(recipe.settled_method)
    settings = settle(recipe.training, scheme, recipe.seed, recipe.settings)
    decides = any(Decision.OUTLIERS in method.decides for method in methods)
    tiles = [tile for method in methods for tile in method.tiles(scheme, settings)]
    return Workload(scheme, model_type, decides and settings.outlier_rule is not None, tiles)


def _running(engine: Engine, asked: Workload, format: str | None, limits: ModelLimits) -> list[Way]:
    """The ways in which an engine runs this. Raises RecipeError with the nearest scheme where there is none."""
    ways = [way for way in engine.ways if format in (None, way.format)]
    if not ways:
        assert format is not None
        raise _other_format(engine, format)
    refusals = [(way, way.refusal(asked)) for way in ways]
    if running := [way for way, refusal in refusals if refusal is None]:
        return running
    furthest: dict[str, Refusal] = {}
    for way, refusal in refusals:
        assert refusal is not None
        if way.format not in furthest or refusal.check > furthest[way.format].check:
            furthest[way.format] = refusal
    why = "; ".join(f"in {name} it does not run {refusal.reason}" for name, refusal in furthest.items())
    method = " with this method" if asked.outliers or asked.tiles else ""
    raise RecipeError(
        f"{engine.name} cannot run scheme {asked.scheme}{method}: {why}. {_remedy([ways], asked, limits)}"
        f"{_elsewhere(engine, asked, format, limits)}; bitwright engines shows the table"
    )


def _other_format(engine: Engine, format: str) -> RecipeError:
    known = ", ".join(dict.fromkeys(way.format for way in engine.ways))
    if format in engine.also:
        return RecipeError(
            f"{engine.name} loads format {format} {engine.also[format]}; what it runs of that is not in the table that "
            f"--engine asks. Leave --engine {engine.name} out, or take one of its other formats: {known}"
        )
    return RecipeError(f"{engine.name} does not load format {format}; it loads {known}. Leave --format out")


def _elsewhere(engine: Engine, asked: Workload, format: str | None, limits: ModelLimits) -> str:
    """That another format would do, where one was named."""
    others = [] if format is None else [way for way in engine.ways if way.refusal(asked) is None]
    able = next((way.format for way in others if limits.refuse(asked.scheme, way.format, [way]) is None), None)
    return f", or leave --format out: {engine.name} runs {asked.scheme} in {able}" if able else ""


def _remedy(engines: Sequence[Sequence[Way]], asked: Workload, limits: ModelLimits, said: Collection[str] = ()) -> str:
    """What to try: the nearest scheme, and the flags without which the method would ask for more than it.

    ``said`` are reasons that the message has given already.
    """
    near, why = _nearest(engines, asked, limits)
    if near is None:
        return "No scheme helps" + (
            f": the nearest would be {why[0]}, and {why[1]}" if why and why[1] not in said else ""
        )
    able = [[way for way in ways if way.refusal(Workload(near, asked.model_type)) is None] for ways in engines]
    flags = ["--outliers 0"] if asked.outliers and not all(any(w.outliers for w in ways) for ways in able) else []
    flags += ["--axis oc"] if asked.tiles and not all(any(w.per_input for w in ways) for ways in able) else []
    runs = "It runs" if len(engines) == 1 else "They run"
    near_is = f"The nearest scheme that {'it runs' if len(engines) == 1 else 'they run'} is {near}"
    return (f"{runs} this scheme" if near == asked.scheme else near_is) + (f" with {' '.join(flags)}" if flags else "")


def _nearest(
    engines: Sequence[Sequence[Way]], asked: Workload, limits: ModelLimits
) -> tuple[Scheme | None, tuple[Scheme, str] | None]:
    """The scheme least unlike this one that all engines run, in a format that takes the model's linears: activations
    first to stay, then bits, groups and symmetry. None, with the nearest and why it does not fit, where the model is
    what speaks against it."""
    first = None
    for near in sorted(_others(asked.scheme, engines), key=lambda other: _unlike(asked.scheme, other)):
        for format, ways in _shared(engines, Workload(near, asked.model_type)).items():
            why = limits.refuse(near, format, ways)
            if why is None:
                return near, None
            first = first or (near, why)
    return None, first


def _shared(engines: Sequence[Sequence[Way]], asked: Workload) -> dict[str, list[Way]]:
    """The formats in which all of them run this, and the ways."""
    running = [[way for way in ways if way.refusal(asked) is None] for ways in engines]
    formats = [[way.format for way in ways] for ways in running]
    return {format: _of(format, *running) for format in formats[0] if all(format in others for others in formats)}


def _others(scheme: Scheme, engines: Sequence[Sequence[Way]]) -> Iterator[Scheme]:
    yield scheme
    theirs = {size for ways in engines for way in ways for size in way.groups or way.multiples}
    sizes = sorted({*GROUPS, *theirs, FULL, _size(scheme.tile)})
    for bits, symmetric, size in product(EVERY_BITS, (False, True), sizes):
        for activations in {(scheme.activation_bits, scheme.kv_bits), (None, None)}:
            yield Scheme(Grid.integers(bits, symmetric), Tile(1, size), *activations)
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
