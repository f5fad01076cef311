"""What config.json of an exported folder has to say: the terms that most linears share, and what departs from them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from math import gcd
from typing import Any

import torch

from bitwright.convert.refitting import refitted
from bitwright.core.errors import RecipeError
from bitwright.core.format import Format, TensorFormat
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, WrittenModel, departures
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder
from bitwright.model.source import family_of
from bitwright.model.view import ModelView
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED


def terms_of(weight: QTensor) -> dict[str, Any]:
    """What config.json may have to say of a linear."""
    return {
        "bits": weight.grid.bits,
        "symmetric": weight.grid.symmetric,
        "group": [weight.tile.out, weight.tile.in_],
        "shape": list(weight.shape),
        "tile": list(weight.tile.size(weight.shape)),
        "outliers": 0 if weight.outlier_index is None else weight.outlier_index.numel(),
        "dtype": str(weight.scale.dtype).removeprefix("torch."),
    }


def written_model(
    model: QuantizedFolder, format: str, rows: Sequence[Mapping[str, Any]], kept: tuple[str, ...]
) -> WrittenModel:
    """What there is to say of linears with these names and terms: those of most are the scheme's, the others depart.

    Raises RecipeError for linears on several grids.
    """
    described = _described(model)
    terms = [(row["bits"], row["symmetric"], *row["group"]) for row in rows]
    bits, symmetric, out, in_ = max(sorted(set(terms)), key=terms.count)
    scheme = Scheme(
        Grid.integers(bits, symmetric),
        Tile(out, in_),
        activation_bits=None if described.activations is None else described.activations.bits,
        kv_bits=None if described.kv is None else described.kv.bits,
    )
    unlike = [row["name"] for row in rows if (row["bits"], row["symmetric"]) != (bits, symmetric)]
    if unlike:
        raise _on_another_grid(unlike[0], format)
    family = family_of(model.folder)
    dtype: torch.dtype = getattr(torch, rows[0]["dtype"])
    return WrittenModel(scheme, family, dtype, kept, departures(scheme, rows))


def refuse_activations(model: QuantizedFolder, to: Format) -> None:
    """Raise RecipeError, before any weight is read, for activations or a KV cache that a format has no place for."""
    described = model.described
    if not to.weights_only or described is None or not model.linears:
        return
    if described.activations or described.kv:
        name = model.linears[0]
        activations, kv = (None if grid is None else grid.bits for grid in (described.activations, described.kv))
        tile = described.tile_of(name) or Tile(1, FULL)
        scheme = Scheme(described.grid_of(name), tile, activation_bits=activations, kv_bits=kv)
        raise RecipeError(
            f"format {to.name} cannot hold the activations or KV cache of scheme {scheme}, which {model.folder} was "
            f"quantized with; use format {WIDELY_LOADED} or {HOLDS_ALL}, or quantize the original with A16"
        )


def refuse_terms(model: QuantizedFolder, format: str, to: TensorFormat, lossy: bool) -> None:
    """Raises RecipeError, before anything is written, for linears on several grids that the format holds as they are,
    and for activations that it has no place for."""
    described = _described(model)
    grids = Counter(grid for name in model.linears if to.holds(grid := described.grid_of(name), Tile(1, FULL), False))
    if len(grids) > 1:
        most = max(grids, key=lambda grid: grids[grid])
        raise _on_another_grid(
            next(name for name in model.linears if described.grid_of(name) in grids.keys() - {most}), format
        )
    if model.linears and (described.activations or described.kv):
        name = model.linears[0]
        weight, _ = refitted(name, model.read(name), to, lossy, common_columns(model))
        to.config(written_model(model, format, [{"name": name} | terms_of(weight)], ()))


def common_columns(model: QuantizedFolder) -> int:
    """What the input features of all linears are multiples of: groups that divide it divide them all."""
    return gcd(*(model.shape(name)[1] for name in model.linears))


def refuse_departures(model: QuantizedFolder, to: Format) -> None:
    """Raises RecipeError, before anything is written, for linears that a format holds on no grid: with outliers, or
    in groups along the output, as far as config.json names them."""
    described, grids = (
        _described(model),
        [Grid.integers(bits, symmetric) for bits, symmetric in product(range(MIN_BITS, MAX_BITS + 1), (False, True))],
    )
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


def kept_linears(model: QuantizedFolder) -> tuple[str, ...]:
    """The linears that are not quantized, by their names in the model as transformers sees it, else as they were said
    to be: not every format names all of them."""
    quantized = {f"{linear}.weight" for linear in model.linears}
    view = ModelView.of(model.checkpoint, (*model.passed, *quantized))
    if view is None:
        said = () if model.described is None else model.described.kept
        return tuple(sorted({*said, "lm_head"} - set(model.linears)))
    return tuple(sorted(view.linears - {view.linear(name) for name in quantized}))


def _described(model: QuantizedFolder) -> Described:
    assert model.described is not None
    return model.described


def _on_another_grid(linear: str, format: str) -> RecipeError:
    return RecipeError(
        f"{linear}: on another grid than most linears; format {format} has one for all. Quantize the original with "
        f"--format {format}"
    )
