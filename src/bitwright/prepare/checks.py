"""The checks of a recipe against a model, made from names, shapes and dtypes before any weight is read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from bitwright.core.block import Family
from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.format import Format, TensorFormat
from bitwright.core.grid import Tile
from bitwright.core.scheme import Allocation, Scheme
from bitwright.core.weight import Weight, starred
from bitwright.model.discover import embedding
from bitwright.model.source import DTYPES, Source
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED, target
from bitwright.prepare.way import Inventory


def check_scheme(source: Source, family: Family | None, scheme: Scheme) -> None:
    """Refuse quantized activations if not every block has one ordinary attention. Raises RecipeError."""
    if family is None and scheme.quantizes_activations:
        raise RecipeError(
            f"scheme {scheme} quantizes activations, and '{source.model_type}' has blocks in which transformers' "
            "attention was not found for certain (linear attention, state spaces, a mixer of its own); take a scheme "
            "with A16"
        )


def check_activations(inventory: Inventory, scheme: Scheme) -> None:
    """Refuse quantized activations beside weights that are dense once they are loaded. Raises RecipeError."""
    dense = inventory.special or inventory.merged
    if scheme.quantizes_activations and dense is not None:
        raise RecipeError(
            f"scheme {scheme} quantizes what linears read, and {dense} is no linear of its own once it is loaded "
            "(experts in one parameter, or stored transposed): nothing would quantize its inputs. Take a scheme with "
            f"A16, or leave such weights as they are with --exclude '{starred(dense)}'"
        )


def check_dtypes(source: Source, inventory: Inventory) -> None:
    """Refuse weights that are no ordinary floating-point numbers, and empty ones. Raises CheckpointError.

    Those of models that are quantized already are float8, for instance.
    """
    checkpoint, known = source.checkpoint, set(DTYPES.values())
    _ = checkpoint.dtype_of_weights  # refuses a checkpoint in which nothing is floating
    outer = embedding(checkpoint.names)
    for name in [*([] if outer is None else [outer]), *(weight.tensor for weight in inventory.weights)]:
        entry = checkpoint.entry(name)
        if 0 in entry.shape:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is empty: its shape is {list(entry.shape)}; download it again"
            )
        if entry.dtype not in known:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is stored as {str(entry.dtype).removeprefix('torch.')}; Bitwright "
                f"quantizes {', '.join(DTYPES)}. Start from the original, or convert the model with transformers"
            )


def check_names(source: Source, inventory: Inventory, format: TensorFormat) -> None:
    """Refuse tensors that a reader of the result would take for a part of what is quantized. Raises CheckpointError.

    Beside a weight that stays in full precision, they stay too. ``format`` is that of the tensors to write.
    """
    if format.reader is None:
        return
    formats = [other for other in (format, target(WIDELY_LOADED), target(HOLDS_ALL)) if isinstance(other, TensorFormat)]
    leaves, codes = {leaf for written in formats for leaf in written.leaves}, {written.codes for written in formats}
    quantized, checkpoint = {*inventory.linears}, source.checkpoint
    for name in checkpoint.names:
        stem, _, leaf = name.rpartition(".")
        in_full = f"{stem}.weight" in checkpoint and leaf not in codes
        if leaf in leaves and leaf != "weight" and not (in_full and stem not in quantized):
            way_out = f". Or leave it as it is: --exclude '{stem}'" if in_full else ""
            raise CheckpointError(
                f"{checkpoint.folder}: {stem} is partly quantized already: there is a tensor {name}, which is how a "
                "part of a quantized weight is called. Start from the full-precision model" + way_out
            )


@dataclass(frozen=True)
class _Kind:
    """Weights alike: of experts there are thousands."""

    shape: tuple[int, ...]
    transposed: bool
    scheme: Scheme


def check_shapes(
    inventory: Inventory,
    allocation: Allocation,
    tiles: Callable[[Scheme], Iterable[Tile]],
    format: Format,
    advise: bool = True,
) -> None:
    """Require that the format packs the shape of every weight, and that it divides into the tiles of its scheme.

    ``tiles`` are those that a scheme asks for. Raises SchemeError or RecipeError; with ``advise`` these say which
    groups of the format do divide it, and how a weight is left as it is.
    """
    kinds: dict[_Kind, Weight] = {}
    for weight in inventory.weights:
        kinds.setdefault(_Kind(weight.shape, weight.transposed, allocation.scheme(weight.name)), weight)
    errors = dict[_Kind, SchemeError | RecipeError]()
    for kind, weight in kinds.items():
        try:
            format.check_shape(weight.name, weight.shape)
            for tile in tiles(kind.scheme):
                weight.tile(tile).counts(weight.slice, _offered(format, kind.scheme, tile) if advise else None)
        except RecipeError as error:
            errors[kind] = error
        except SchemeError as error:
            asked = allocation.asked_by(weight.name)
            errors[kind] = SchemeError(f"{weight.name} {list(weight.shape)} under scheme {kind.scheme}{asked}: {error}")
    if errors:
        first = min(errors.values(), key=lambda error: isinstance(error, SchemeError))
        raise type(first)(f"{first}{_or_leave_them(inventory, allocation, errors) if advise else ''}")


def fits_shapes(inventory: Inventory, scheme: Scheme, format: Format) -> bool:
    """Whether a format packs all weights, and they divide into the tiles of a scheme."""
    try:
        check_shapes(inventory, Allocation(scheme), lambda _: [scheme.tile], format, advise=False)
    except (SchemeError, RecipeError):
        return False
    return True


def _offered(format: Format, scheme: Scheme, tile: Tile) -> Callable[[int], bool]:
    """Whether a format holds such weights in groups of a size, along the dimension of the tile's."""
    return lambda size: format.holds(scheme.weight, Tile(1, size) if tile.out == 1 else Tile(size, 1), False)


def _or_leave_them(inventory: Inventory, allocation: Allocation, kinds: Mapping[_Kind, Exception]) -> str:
    """How all weights of these kinds stay in full precision, if that can be asked for and leaves any."""
    unfit, ways = [weight for weight in inventory.weights if _kind(weight, allocation) in kinds], list[str]()
    if inventory.copied_head and unfit[-1] is inventory.weights[-1]:
        unfit = unfit[:-1]
        ways.append("leave --quantize-lm-head out")
    if 0 < len(unfit) < len(inventory.weights):
        ways.append(f"leave what does not fit as it is: --exclude '{_names(unfit)}'")
    return f". Or {' and '.join(ways)}" if ways else ""


def _kind(weight: Weight, allocation: Allocation) -> _Kind:
    return _Kind(weight.shape, weight.transposed, allocation.scheme(weight.name))


def _names(weights: Collection[Weight]) -> str:
    return ",".join(dict.fromkeys(starred(weight.name) for weight in weights))
