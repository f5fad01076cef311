"""compressed-tensors folders, whoever wrote them: llm-compressor above all, in several layouts.

Integer weights of 2 to 8 bits, packed (``pack-quantized``) or one to a byte (``int-quantized``, ``naive-quantized``);
one scale per tensor, channel, group or block; zero points packed, one to a byte, or none; several groups of linears
with bits of their own. Codes and zero points are signed there, ours are not on an asymmetric grid: both are moved up by
``2**(bits-1)``.
"""

from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.errors import CheckpointError
from bitwright.core.grid import FULL, MAX_BITS, MIN_BITS, Grid, Tile
from bitwright.core.packing import WORD_BITS, unpack, unpack_apart
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.formats.gptq import check_order, tile_of

T = TypeVar("T")
PATTERN = "re:"
PACKED, MIXED = "pack-quantized", "mixed-precision"
LAYOUTS = (PACKED, "int-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
LEAVES = ("weight_scale", "weight_packed", "weight", "weight_zero_point", "weight_shape", "weight_g_idx")
"""How the names of a weight's tensors end; the first is always there."""
READABLE = (
    "of compressed-tensors, Bitwright reads integer weights of 2 to 8 bits (pack-quantized, int-quantized, "
    "naive-quantized) with one scale per tensor, channel, group or block, and activations that are integers, quantized "
    "as the model runs"
)


def described(config: Mapping[str, Any]) -> Described:
    """What the quantization_config of a folder says. Raises CheckpointError for what cannot be read: ``READABLE``."""
    try:
        return _described(config)
    except (AttributeError, TypeError, KeyError) as error:  # numbers and lists where tables should be
        raise CheckpointError(f"its quantization_config cannot be read ({error}); {READABLE}") from None


def _described(config: Mapping[str, Any]) -> Described:
    _check_whole(config)
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, dict)]
    quantized = [group for group in groups if group.get("weights")]
    weights = [(group.get("targets") or [], _weights(group, config)) for group in quantized]
    if not weights:
        raise CheckpointError(f"its config_groups name no weights; {READABLE}")
    first, tiles = quantized[0], [(group.get("targets") or [], _tile(group["weights"])) for group in quantized]
    attention = next((group for group in groups if not group.get("weights")), {})
    cache = config.get("kv_cache_scheme") or attention.get("input_activations")
    return Described(
        _of_most(weights),
        _dynamic(first.get("input_activations"), "activations"),
        _dynamic(cache, "a KV cache"),
        tuple(config.get("ignore") or ()),
        variant=str(config.get("format") or ""),
        rules=tuple(_patterns(weights)),
        tile=_of_most(tiles),
        tiles=tuple(_patterns(tiles)),
        grids=_names(weights),
        named_tiles=_names(tiles),
        queries=bool(attention.get("input_activations")),
    )


def _of_most(groups: list[tuple[list[str], T]]) -> T:
    """The value for classes of modules, else the first value."""
    return next((value for targets, value in groups if any(target[:1].isupper() for target in targets)), groups[0][1])


def shape(stored: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor], grid: Grid) -> tuple[int, ...]:
    """The shape of a weight [O, I], from the shapes of its tensors or what is in them."""
    try:
        return tuple(read("weight_shape").tolist())
    except CheckpointError as missing:
        try:
            return stored("weight")  # one code to a byte
        except CheckpointError:
            raise missing from None


def read(tensors: Mapping[str, Tensor], name: str, described: Described) -> QTensor:
    """The QTensor of one linear; on a symmetric grid if its zero points are none or 0.

    Raises ValueError for tensors that do not fit together, CheckpointError for groups out of order (``actorder``).
    """
    grid = described.grid_of(name)
    codes = _codes(tensors, name, grid.bits)
    rows, columns = codes.shape
    scale = tensors[f"{name}.weight_scale"]
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    if scale.shape[0] > rows or scale.shape[1] > columns:
        raise ValueError(f"scales {list(scale.shape)} for a weight {[rows, columns]}")
    check_order(name, tensors.get(f"{name}.weight_g_idx"), columns, scale.shape[1])
    zero = _zeros(tensors.get(f"{name}.weight_zero_point"), scale, grid.bits)
    tile, middle = Tile(rows // scale.shape[0], columns // scale.shape[1]), 2 ** (grid.bits - 1)
    if grid.symmetric and (zero is None or not (zero.is_meta or zero.any())):
        return QTensor(codes, scale, None, grid, tile)
    if zero is None:
        raise ValueError("its config says asymmetric, and there is no weight_zero_point")
    return QTensor(_raised(codes, middle), scale, _raised(zero, middle), Grid.integers(grid.bits), tile)


def _codes(tensors: Mapping[str, Tensor], name: str, bits: int) -> Int[Tensor, "O I"]:
    """Signed codes."""
    words, signed = tensors.get(f"{name}.weight_packed"), Grid.integers(bits, symmetric=True)
    if words is not None:
        return _unpacked(words, signed, tensors[f"{name}.weight_shape"].tolist()[1])
    if f"{name}.weight" not in tensors and f"{name}.weight_shape" in tensors:
        raise KeyError(f"{name}.weight_packed")
    codes = tensors[f"{name}.weight"]
    if codes.dtype != torch.int8:
        raise ValueError(f"weights of dtype {codes.dtype} beside scales, not int8")
    if codes.is_meta:  # without data: only whether it fits is asked
        return codes
    if int(codes.min()) < signed.qmin or int(codes.max()) > signed.qmax:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())}, which are more than {bits} bits")
    return codes


def _zeros(stored: Tensor | None, scale: Float[Tensor, "P Q"], bits: int) -> Int[Tensor, "P Q"] | None:
    """Signed zero points: packed along the output, or one to a byte."""
    if stored is None:
        return None
    if stored.dtype == torch.int32:
        return _unpacked(stored.t().contiguous(), Grid.integers(bits, symmetric=True), len(scale)).t().contiguous()
    if stored.is_floating_point() or stored.numel() != scale.numel():
        raise ValueError(f"zero points of dtype {stored.dtype} and shape {list(stored.shape)}")
    return stored.reshape(scale.shape).to(torch.int8)


def _unpacked(words: Int[Tensor, "R W"], grid: Grid, columns: int) -> Int[Tensor, "R C"]:
    """Codes of rows of words: dense, as they are today, or no code split between words, as was once usual."""
    count = words.shape[1]
    if words.dtype != torch.int32:
        raise ValueError(f"words of dtype {words.dtype}, not int32")
    if count == ceil(columns * grid.bits / WORD_BITS):
        return unpack(words, grid, columns)
    if count == ceil(columns / (WORD_BITS // grid.bits)):
        apart: Tensor = unpack_apart(words, grid.bits, columns) - 2 ** (grid.bits - 1)
        return apart.view(torch.int8)
    raise ValueError(f"{count} words for {columns} codes of {grid.bits} bits")


def _raised(signed: Int[Tensor, "P Q"], middle: int) -> Int[Tensor, "P Q"]:
    return (signed.to(torch.int16) + middle).to(torch.uint8)


def _check_whole(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a folder in another layout, sparse, transformed or not compressed."""
    layout, sparse = config.get("format"), config.get("sparsity_config") or {}
    if layout is not None and layout not in (*LAYOUTS, MIXED):
        raise CheckpointError(f"weights stored as {layout}; {READABLE}")
    if sparse.get("format", "dense") != "dense":
        raise CheckpointError(f"weights that are sparse ({sparse['format']}); {READABLE}")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(f"a model that is transformed as it runs (transform_config); {READABLE}")
    if config.get("quantization_status", "compressed") != "compressed":
        raise CheckpointError(f"weights that are not packed yet (quantization_status); {READABLE}")


def _weights(group: Mapping[str, Any], config: Mapping[str, Any]) -> Grid:
    """The grid of one group of linears."""
    weights, layout = group["weights"], group.get("format") or config.get("format")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy") or "tensor"
    whole = isinstance(bits, int) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS
    if layout not in LAYOUTS or kind != "int" or strategy not in STRATEGIES or not whole:
        raise CheckpointError(
            f"weights of {bits} bits, type {kind}, strategy {strategy}, stored as {layout}; {READABLE}"
        )
    return Grid.integers(bits, bool(weights.get("symmetric", True)))


def _tile(weights: Mapping[str, Any]) -> Tile | None:
    """The weights that share a scale; None if the config does not tell."""
    group = weights.get("group_size")
    match weights.get("strategy"):
        case "tensor":
            return Tile(FULL, FULL)
        case "channel":
            return Tile(1, FULL)
        case "group":
            return tile_of(group)
        case "block" if (block := weights.get("block_structure")) is not None:
            return Tile(int(block[0]), int(block[1]))
    return None


def _names(weights: list[tuple[list[str], T]]) -> dict[str, T]:
    """The values for single modules by their names, and for classes of modules, which no module is called like."""
    named = [(target, value) for targets, value in weights for target in targets if not target.startswith(PATTERN)]
    return dict(reversed(named))


def _patterns(weights: list[tuple[list[str], T]]) -> Iterator[tuple[str, T]]:
    """The values for modules whose names fit a regular expression: they count after names, as in the library."""
    for targets, value in weights:
        yield from ((t.removeprefix(PATTERN), value) for t in targets if t.startswith(PATTERN))


def _dynamic(args: Any, what: str) -> Grid | None:
    """The grid of activations or of a KV cache that is quantized as the model runs."""
    if not args:
        return None
    bits = args.get("num_bits")
    if args.get("type", "int") != "int" or args.get("dynamic") is not True or not MIN_BITS <= (bits or 0) <= MAX_BITS:
        raise CheckpointError(
            f"{what} of {bits} bits, type {args.get('type')}, dynamic {args.get('dynamic')}; {READABLE}"
        )
    return Grid.integers(int(bits), bool(args.get("symmetric", True)))


def codes_may_be_weight(described: Described) -> bool:
    """Whether a tensor X.weight may hold codes, one to a byte."""
    return described.variant != PACKED
