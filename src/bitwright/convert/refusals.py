"""The checks of an export before any weight is read, from headers and config.json."""

from collections import Counter
from itertools import product

from bitwright.convert.refitting import Groups
from bitwright.core.errors import RecipeError, in_shell
from bitwright.core.format import FileFormat, Foreseen, Format, TensorFormat, WriteOptions, typical
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED
from bitwright.verification.completeness import require_all_tensors, require_sound_headers


def refuse(model: QuantizedFolder, to: Format, options: WriteOptions) -> None:
    """Refuse an export that headers and config.json show to be impossible. Raises RecipeError, CheckpointError."""
    _refuse_activations(model, to)
    if model.described is not None and not options.lossy:
        _refuse_departures(model, to)
    require_sound_headers(model)
    if isinstance(to, FileFormat):
        to.check(model.checkpoint.config, model.folder, options, _foreseen(model))
        return
    if model.format is None:
        raise RecipeError(
            f"{model.folder} is not quantized: bitwright quantize {in_shell(model.folder)} --format {to.name} does that"
        )
    if model.stacks:
        raise RecipeError(
            f"{model.stacks[0]} in {model.folder} is fused over experts, and such weights are not exported; quantize "
            f"the original with --format {to.name}"
        )
    if model.format_name == to.name:
        raise RecipeError(f"{model.folder} is a {to.name} folder already; name another format")
    require_all_tensors(model)
    for name in model.linears:
        to.check_shape(name, model.shape(name))
    assert isinstance(to, TensorFormat)
    _refuse_mix(model, to)


def _foreseen(model: QuantizedFolder) -> Foreseen:
    first = model.read(typical(model)) if model.linears else None
    grid, tile = (None, None) if first is None else (first.grid, first.tile)
    return Foreseen({name: model.shape(name) for name in model.linears}, model.passed, grid, tile)


def _refuse_activations(model: QuantizedFolder, to: Format) -> None:
    """Raise RecipeError for quantized activations or a KV cache that a format has no place for."""
    described = model.described
    if not to.weights_only or described is None or not model.linears:
        return
    if described.activations or described.kv:
        name = model.linears[0]
        activations, kv = (None if grid is None else grid.bits for grid in (described.activations, described.kv))
        tile = described.tile_of(name) or Tile(1, FULL)
        scheme = Scheme(described.grid_of(name), tile).with_activations(activations, kv)
        raise RecipeError(
            f"format {to.name} cannot hold the activations or KV cache of scheme {scheme}, which {model.folder} was "
            f"quantized with; use format {WIDELY_LOADED} or {HOLDS_ALL}, or quantize the original with A16"
        )


def _refuse_departures(model: QuantizedFolder, to: Format) -> None:
    """Raise RecipeError for linears that a format cannot hold on any grid.

    These are linears with outliers or with groups along the output, as far as config.json names them.
    """
    described = model.described
    grids = [Grid.integers(*kind) for kind in product(range(MIN_BITS, MAX_BITS + 1), (False, True))]
    assert described is not None
    for name in (name for name in model.linears if name in described.departures):
        rows, columns = described.departures[name].tile
        outliers = described.departures[name].outliers
        tile = Tile(1, FULL) if rows == 1 else Tile(rows, columns)
        if not any(to.holds(grid, tile, outliers > 0) for grid in grids):
            also = f", with {outliers} outliers," if outliers else ""
            raise RecipeError(
                f"{name}: a weight in tiles of {rows} x {columns}{also} cannot be held exactly in this format, which "
                f"holds {to.holds_what}. --lossy quantizes such weights once more and says what that adds"
            )


def _refuse_mix(model: QuantizedFolder, to: TensorFormat) -> None:
    """Raise RecipeError for linears on several grids, or in groups of several sizes, if the format has one for all."""
    if to.mixes or model.described is None:
        return
    grids = {name: model.described.grid_of(name) for name in model.linears}
    held = Counter(grid for grid in grids.values() if to.holds(grid, Tile(1, FULL), False))
    if len(held) > 1:
        most = held.most_common(1)[0][0]
        unlike = next(name for name, grid in grids.items() if grid in held and grid != most)
        raise RecipeError(
            f"{unlike}: on another grid than most linears; format {to.name} has one for all. Quantize the original "
            f"with --format {to.name}"
        )
    outlines = {name: model.outline(name) for name in model.linears}
    usual = Groups.of(outlines.values()).usual
    for name, weight in outlines.items():
        group = weight.tile.size(weight.shape)[1]
        if usual is not None and weight.tile.out == 1 and group % usual:
            what = f"groups of {group}" if weight.scale.shape[1] > 1 else f"one group per row of {group}"
            raise RecipeError(
                f"{name}: in {what}, where most linears have groups of {usual}; format {to.name} has one size of "
                f"groups for all. Quantize the original with --format {to.name}, or take --format {WIDELY_LOADED}"
            )
