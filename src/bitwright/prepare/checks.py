"""What a recipe may not ask of a model: told from names, shapes and dtypes, before any weight is read."""

from collections.abc import Callable, Collection, Iterable
from itertools import product

from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.format import Format, TensorFormat
from bitwright.core.grid import Tile
from bitwright.core.registry import described, format_of
from bitwright.core.scheme import Scheme
from bitwright.core.weight import Weight, starred
from bitwright.model.source import DTYPES, Source
from bitwright.prepare.format_choice import HOLDS_ALL, WIDELY_LOADED
from bitwright.prepare.tensor_work import TensorWork
from bitwright.prepare.work import Work

_Kind = tuple[tuple[int, ...], bool]
"""Shape of a weight, and whether it is stored turned."""


def check_weights_alone(format: str | None, scheme: Scheme) -> None:
    """Refuses quantized activations where a format has a place for weights alone."""
    if scheme.activations or scheme.kv:
        raise RecipeError(
            f"format {format} holds weights alone, and scheme {scheme} quantizes activations or KV cache too; "
            f"take W{scheme.weight.bits}A16, or --format compressed-tensors"
        )


def check_scheme(source: Source, scheme: Scheme) -> None:
    """Refuses what has to know the architecture where nobody has described it."""
    if source.family is None and (scheme.activations or scheme.kv):
        raise RecipeError(
            f"scheme {scheme} quantizes activations, which takes an architecture that Bitwright knows, and "
            f"'{source.model_type}' is none ({', '.join(described())}); take a scheme with A16"
        )


def check_dtypes(source: Source, work: Work) -> None:
    """Refuses weights that are no ordinary floating-point numbers, such as the float8 of models quantized already, and
    those of no numbers at all."""
    checkpoint, known = source.checkpoint, set(DTYPES.values())
    _ = checkpoint.dtype_of_weights  # refuses a checkpoint in which nothing is floating
    embedding = [f"{source.family.embedding}.weight"] if source.family else []
    for name in [*embedding, *(weight.tensor for weight in work.weights)]:
        found, shape = checkpoint.entry(name).dtype, checkpoint.entry(name).shape
        if 0 in shape:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is empty: its shape is {list(shape)}; download it again"
            )
        if found not in known:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is stored as {str(found).removeprefix('torch.')}; Bitwright quantizes "
                f"{', '.join(DTYPES)}. Start from the original, or convert the model with transformers"
            )


def check_names(source: Source, work: Work, format: TensorFormat) -> None:
    """Refuses tensors that a reader of the result would take for a part of what is quantized.

    Beside a weight that stays as it is, they stay too. ``format`` is that of the tensors to write.
    """
    if format.reader is None:
        return
    written = (format, format_of(WIDELY_LOADED), format_of(HOLDS_ALL))
    leaves = {leaf for each in written if isinstance(each, TensorFormat) for leaf in each.leaves}
    codes = {each.codes for each in written if isinstance(each, TensorFormat)}
    quantized = {weight.name for weight in work.weights}
    checkpoint = source.checkpoint
    for name in checkpoint.names:
        stem, _, leaf = name.rpartition(".")
        in_full = f"{stem}.weight" in checkpoint and leaf not in codes
        if leaf in leaves and leaf != "weight" and not (in_full and stem not in quantized):
            way_out = f". Or leave it as it is: --exclude '{stem}'" if in_full and isinstance(work, TensorWork) else ""
            raise CheckpointError(
                f"{checkpoint.folder}: {stem} is partly quantized already: there is a tensor {name}, which is how a "
                "part of a quantized weight is called. Start from the full-precision model" + way_out
            )


def check_shapes(work: Work, scheme: Scheme, tiles: Iterable[Tile], format: Format, advise: bool = True) -> None:
    """Every weight must be of a shape that the format packs, and divide into these tiles.

    Raises SchemeError, RecipeError; with ``advise`` they say which groups the format holds that do divide it, and how
    one weight is left as it is.
    """
    kinds: dict[_Kind, Weight] = {}
    for weight in work.weights:
        kinds.setdefault((weight.shape, weight.transposed), weight)  # of experts there are thousands alike
    errors = dict[_Kind, SchemeError | RecipeError]()
    for kind, weight in kinds.items():
        try:
            format.check_shape(weight.name, weight.shape)
        except RecipeError as error:
            errors[kind] = error
    for (kind, weight), tile in product(kinds.items(), tiles):
        try:
            weight.tile(tile).counts(weight.slice, _offered(format, scheme, tile) if advise else None)
        except SchemeError as error:
            what = f"{weight.name} {list(weight.shape)} under scheme {scheme}: {error}"
            errors.setdefault(kind, SchemeError(what))
    if errors:
        first = next(iter(errors.values()))
        raise type(first)(f"{first}{_or_leave_them(work, errors) if advise else ''}")


def _offered(format: Format, scheme: Scheme, tile: Tile) -> Callable[[int], bool]:
    """Whether a format holds such weights in groups of a size, along the dimension of the tile's."""
    return lambda size: format.holds(scheme.weight, Tile(1, size) if tile.out == 1 else Tile(size, 1), False)


def _or_leave_them(work: Work, kinds: Collection[_Kind]) -> str:
    """How all weights of these kinds stay as they are, where that can be asked for and leaves any."""
    unfit, ways = [weight for weight in work.weights if (weight.shape, weight.transposed) in kinds], []
    if work.copied_head and unfit[-1] is work.weights[-1]:
        unfit = unfit[:-1]
        ways.append("leave --quantize-lm-head out")
    if isinstance(work, TensorWork) and 0 < len(unfit) < len(work.weights):
        names = ",".join(dict.fromkeys(starred(weight.name) for weight in unfit))
        ways.append(f"leave what does not fit as it is: --exclude '{names}'")
    return f". Or {' and '.join(ways)}" if ways else ""
