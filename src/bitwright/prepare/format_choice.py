"""The choice of the format that a result is written in.

It is the format that was named; else compressed-tensors if all linears fit into it, and bitwright if one does not. The
two share their tensors, so the choice can wait until every method has decided: it is what config.json says.
"""

from collections.abc import Callable, Sequence

from bitwright.core.configuration import Configuration
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat, Format, TensorFormat
from bitwright.core.grid import Tile, Zero
from bitwright.core.quantized import WrittenModel
from bitwright.core.recipe import SHARD_SIZE, Recipe
from bitwright.core.registry import format_of
from bitwright.core.scheme import Allocation, Scheme
from bitwright.prepare.nearest_scheme import nearest_first

TRANSFORMERS = "transformers"
WIDELY_LOADED, HOLDS_ALL, DENSE = "compressed-tensors", "bitwright", "dense"
ELSEWHERE = (
    f"Leave --format out, or take --format {HOLDS_ALL} (transformers loads it after 'import bitwright') or --format "
    f"{DENSE}"
)


def is_single(named: str | None) -> bool:
    """Whether the result is one file. Raises RecipeError for a name that is none."""
    format = target(named)
    return isinstance(format, FileFormat) and format.single


def target(named: str | None) -> Format:
    """The format that was named, or the one that holds all. Raises RecipeError for a name that is none."""
    return format_of(HOLDS_ALL if named is None else named)


def encoder(named: str | None) -> TensorFormat:
    """The format whose tensors are written on the way. Raises RecipeError for a name that is none."""
    format = target(named)
    format = format if isinstance(format, TensorFormat) else format_of(HOLDS_ALL)
    assert isinstance(format, TensorFormat)
    return format


def refuse_idle(format: str | None, embeddings: object, base: object, shard_size: str) -> None:
    """Raise RecipeError for what is asked of a file format if the format is none, and for shards of one."""
    files = isinstance(target(format), FileFormat)
    for name, value in (("embeddings", embeddings), ("base", base)):
        if value is not None and not files:
            what = "without a format of a file (gguf, mlc), there is" if format is None else f"format {format} has"
            raise RecipeError(f"{what} no use for --{name}; leave it out")
    if shard_size != SHARD_SIZE and files:
        raise RecipeError(f"format {format} has no use for --shard-size {shard_size}; leave it out")


def not_widely_loaded(weight: str) -> str:
    """Why a weight has no place in the widely loaded format."""
    return (
        f"transformers cannot load {weight} from format {WIDELY_LOADED}: of linears it takes ordinary ones, of experts "
        "those that are each a tensor of its own, all quantized, symmetric"
    )


def expected(
    named: str | None,
    configuration: Configuration,
    allocation: Allocation,
    only_ours: str | None,
    passes: Callable[[Scheme], bool],
) -> str:
    """The format as far as it is known at the start: one name, or two.

    ``only_ours`` is a weight that transformers loads with our plugin only. ``passes`` tells whether the model's weights
    divide into the tiles of a scheme. Raises RecipeError if the format that was named may not hold the result.
    """
    if only_ours and named == WIDELY_LOADED:
        raise RecipeError(f"{not_widely_loaded(only_ours)} (W4A16g128sym). {ELSEWHERE}")
    candidate = format_of(WIDELY_LOADED if named is None else named)
    all_fit = True
    for scheme in allocation.distinct:
        freedoms = configuration.freedoms(scheme)
        outliers = any(freedom.outliers is not None for freedom in freedoms)
        possible = [scheme.tile, *(tile for freedom in freedoms for tile in freedom.tiles)]
        fits = all(candidate.holds(scheme.weight, tile, outliers) for tile in possible)
        if named is not None and not fits:
            raise RecipeError(
                f"format {named} cannot hold {_what(candidate, scheme, possible, outliers)}, which "
                f"{_asked(scheme, allocation)} and the method ask for: it holds {candidate.holds_what}. "
                f"{_nearest(candidate, scheme, passes)}{ELSEWHERE}"
            )
        must = any(freedom.tiles and not freedom.compared for freedom in freedoms)
        if named is None and (only_ours or must or not candidate.holds(scheme.weight, scheme.tile, False)):
            return HOLDS_ALL
        all_fit &= fits
    if named is not None and not allocation.uniform and not candidate.mixes:
        linear, scheme = next(iter(allocation.own.items()))
        raise RecipeError(
            f"format {named} has one scheme for all linears, and {linear} is to have {scheme} beside "
            f"{allocation.default}{allocation.asked_by(linear)}. {ELSEWHERE}"
        )
    return named or (WIDELY_LOADED if all_fit else f"{WIDELY_LOADED} or {HOLDS_ALL}")


def _asked(scheme: Scheme, allocation: Allocation) -> str:
    """A scheme, and the first linear that has it if it is not that of all."""
    linear = next((name for name, own in allocation.own.items() if own == scheme), None)
    return f"scheme {scheme}" if linear is None else f"scheme {scheme} of {linear}{allocation.asked_by(linear)}"


def _nearest(format: Format, scheme: Scheme, passes: Callable[[Scheme], bool]) -> str:
    """The scheme most like one that a format does not hold, of those that it holds; nothing if it holds that one."""
    for near in nearest_first(scheme, ()):
        if format.holds(near.weight, near.tile, False) and passes(near):
            return "" if near == scheme else f"The nearest scheme that it holds is {near}. "
    return ""


def _what(format: Format, scheme: Scheme, tiles: Sequence[Tile], outliers: bool) -> str:
    """What of a recipe a format has no place for, in words."""
    if outliers and all(format.holds(scheme.weight, tile, False) for tile in tiles):
        return "outliers (--outliers 0 keeps none)"
    if scheme.weight.signed_scale:
        return "the grid of an engine"
    if any(tile.out != 1 for tile in tiles):
        return "groups along the output"
    if scheme.weight.zero is Zero.REAL:
        return f"{scheme.weight.bits}-bit weights with a real-valued zero in these groups"
    kind = "symmetric" if scheme.weight.symmetric else "asymmetric"
    return f"{scheme.weight.bits}-bit {kind} weights in these groups"


def refuse_wrongly_loaded(recipe: Recipe, allocation: Allocation, written: WrittenModel) -> None:
    """Raise RecipeError for a result that the installed transformers would load wrong, unless other engines are asked.

    ``written`` is the result in the widely loaded format.
    """
    if recipe.engines is not None and TRANSFORMERS not in recipe.patterns("engines"):
        return
    format = encoder(WIDELY_LOADED)
    config = format.config(written)
    if config is None or (reason := format.wrongly_loaded(config)) is None:
        return
    default = allocation.default
    what = f"scheme {default}" if allocation.uniform else f"scheme {default} with others for some linears"
    raise RecipeError(
        f"{what} in format {WIDELY_LOADED}: {reason}. Take --format {HOLDS_ALL} (transformers loads it after 'import "
        "bitwright'), or install transformers 5.22.2"
    )


def settled(named: str | None, written: WrittenModel) -> TensorFormat:
    """The format of the folder that is written, every linear decided: of a file format, the one on the way."""
    if named is not None:
        return encoder(named)
    widely = format_of(WIDELY_LOADED)
    schemes = (written.scheme, *written.schemes.values())
    alike = not (written.departures or written.only_ours)
    fits = alike and all(widely.holds(scheme.weight, scheme.tile, False) for scheme in schemes)
    return encoder(WIDELY_LOADED if fits else HOLDS_ALL)
