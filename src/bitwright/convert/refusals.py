"""The checks of an export before any weight is read, from headers and config.json."""

from collections.abc import Mapping
from dataclasses import replace

from bitwright.convert.conversion import written_model
from bitwright.convert.refitting import Groups, foreseen, not_held, not_held_at_all
from bitwright.core.account import LinearReport
from bitwright.core.errors import RecipeError, in_shell
from bitwright.core.format import FileFormat, Foreseen, Format, TensorFormat, WriteOptions, typical
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder
from bitwright.model.view import ModelView
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED, not_widely_loaded
from bitwright.verification.completeness import require_all_tensors, require_sound_headers

Outlines = Mapping[str, QTensor]
"""Linears without their data, by name."""
Terms = Mapping[str, tuple[Grid, Tile]]
"""The grid and the tile that each linear will have in the new format."""


def refuse(model: QuantizedFolder, to: Format, options: WriteOptions) -> None:
    """Refuse an export that headers and config.json show to be impossible. Raises RecipeError, CheckpointError."""
    _refuse_activations(model, to)
    require_sound_headers(model)
    if isinstance(to, FileFormat):
        outlines = _outlines(model)
        to.check(model.checkpoint.config, model.folder, options, _foreseen(model, outlines))
        if not options.lossy:
            _terms(outlines, to, lossy=False)
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
    if to.name == WIDELY_LOADED:
        _refuse_what_needs_our_plugin(model)
    outlines = _outlines(model)
    terms = _terms(outlines, to, options.lossy)
    _refuse_groups(outlines, to)
    _refuse_mix(model, to, outlines, terms)


def _outlines(model: QuantizedFolder) -> Outlines:
    """The linears on the grids that config.json names: an outline alone may not tell whether one is symmetric."""
    if model.described is None:
        return {}
    return {name: replace(model.outline(name), grid=model.described.grid_of(name)) for name in model.linears}


def _foreseen(model: QuantizedFolder, outlines: Outlines) -> Foreseen:
    first = model.read(typical(model)) if model.linears else None
    grid, tile = (None, None) if first is None else (first.grid, first.tile)
    return Foreseen({name: model.shape(name) for name in model.linears}, model.passed, grid, tile, outlines)


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


def _refuse_what_needs_our_plugin(model: QuantizedFolder) -> None:
    """Raise RecipeError for weights that transformers does not load from the widely loaded format."""
    tensors = {name: f"{name}.weight" for name in model.linears}
    view = ModelView.of(model.checkpoint, (*model.passed, *tensors.values()))
    if view is None or model.described is None:
        return
    special, merged = view.needing_plugin(tensors, model.passed)
    symmetric = all(model.described.grid_of(name).symmetric for name in model.linears)
    weight = special or (None if symmetric else merged)
    if weight is not None:
        whole = f"Take --format {HOLDS_ALL}"
        if model.format_name == HOLDS_ALL:
            whole = f"Leave it in format {HOLDS_ALL}"
        raise RecipeError(
            f"{not_widely_loaded(weight)} (W4A16g128sym). {whole} (transformers loads it after 'import bitwright'), or "
            "take --format dense"
        )


def _terms(outlines: Outlines, to: Format, lossy: bool) -> Terms:
    """The grid and tile that every linear will have. Raises RecipeError for one that the format cannot hold."""
    groups, terms = Groups.of(outlines.values()), dict[str, tuple[Grid, Tile]]()
    for name, outline in outlines.items():
        own = foreseen(outline, to, lossy, groups)
        if own is None:
            raise not_held_at_all(name, outline, to) if lossy else not_held(name, outline, to)
        terms[name] = own
    return terms


def _refuse_groups(outlines: Outlines, to: TensorFormat) -> None:
    """Raise RecipeError for linears in groups of several sizes if the format has one size for all."""
    usual = None if to.mixes else Groups.of(outlines.values()).usual
    if usual is None:
        return
    for name, weight in outlines.items():
        group = weight.tile.size(weight.shape)[1]
        if weight.tile.out == 1 and group % usual:
            what = f"groups of {group}" if weight.scale.shape[1] > 1 else f"one group per row of {group}"
            raise RecipeError(
                f"{name}: in {what}, where most linears have groups of {usual}; format {to.name} has one size of "
                f"groups for all. Quantize the original with --format {to.name}, or take --format {WIDELY_LOADED}"
            )


def _refuse_mix(model: QuantizedFolder, to: TensorFormat, outlines: Outlines, terms: Terms) -> None:
    """Raise RecipeError for linears whose schemes cannot stand together in the config of the format."""
    if terms:
        rows = [_row(name, outlines[name], to, *own) for name, own in terms.items()]
        to.config(written_model(model, to, rows, ()))


def _row(name: str, outline: QTensor, to: Format, grid: Grid, tile: Tile) -> LinearReport:
    """The report of a linear as it will be, without sizes and errors; quantized once more, it has no outliers."""
    index = outline.outlier_index if to.holds(grid, tile, True) else None
    outliers = 0 if index is None else index.numel()
    scheme = str(Scheme(grid, tile))
    return LinearReport(name, outline.shape, tile.size(outline.shape), 0, 0, 0, None, outliers, scheme=scheme)
