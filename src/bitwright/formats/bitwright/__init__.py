"""Bitwright's own format, for what others cannot hold: groups along the output, outliers, tiles that differ per linear.

A safetensors folder whose config.json describes itself; docs/formats/bitwright.md says how to read one, and
docs/formats/bitwright.schema.json is ``config.Config`` as a JSON schema. Transformers loads it after
``import bitwright``.

Tensors of a linear X [O, I] with P x Q tiles and K outliers: ``X.weight_packed``, ``X.weight_scale``,
``X.weight_zero_point`` (asymmetric grids; ``X.weight_minimum`` if zeros are real numbers), ``X.weight_shape``,
as compressed-tensors packs and names them (32
codes in exactly ``bits`` int32 words, zero points along the output dimension), and
``X.outlier_index``, ``X.outlier_value`` if K > 0. O / P by I / Q is the tile: no field holds it; if the
last tile of a row is cut short, ``X.weight_tile`` does.

A weight that is fused over experts, N [E, A, B], is E such linears [A, B], their tensors stacked; X is N without an
ending ``.weight``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import ceil, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.format import Reader, ReadRows, ReadTensor, TensorFormat
from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.packing import WORD_BITS, pack, pack_down, unpack, unpack_down
from bitwright.core.qtensor import OUTLIER_INDEX_BITS, QTensor, packed_bits
from bitwright.core.quantized import Departure, Described, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.formats.bitwright.config import DTYPES, Config, Exceptional, Integers, Weights

SIZE_BYTES = 8
"""Bytes of one number of ``weight_shape`` or ``weight_tile``."""
STACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_minimum")
CHAINED = ("outlier_index", "outlier_value")
"""How tensors of slices come together: along a new first dimension, or one after the other."""
LEAVES = (*STACKED, "weight_shape", "weight_tile", *CHAINED, "outlier_count")
"""How the names of a weight's tensors end; the first is always there."""
HOLDS = "everything"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for such a linear: always."""
    return True


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear."""
    tensors = {
        f"{name}.weight_packed": pack(weight.codes, weight.grid),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if weight.tile.cut(weight.shape):
        tensors[f"{name}.weight_tile"] = torch.tensor(weight.tile.size(weight.shape))
    if weight.zero is not None and weight.grid.zero is Zero.REAL:
        tensors[f"{name}.weight_minimum"] = weight.zero.contiguous()
    elif weight.zero is not None:
        tensors[f"{name}.weight_zero_point"] = pack_down(weight.zero, weight.grid)
    if weight.outlier_index is not None and weight.outlier_value is not None and weight.outlier_index.numel():
        tensors[f"{name}.outlier_index"] = weight.outlier_index
        tensors[f"{name}.outlier_value"] = weight.outlier_value.to(weight.scale.dtype)
    return tensors


def decode(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "O I"]:
    """The weight [O, I] of one linear as written, in the dtype of its scales."""
    return _read(tensors, name, grid).dequantize()


def described(config: Mapping[str, Any]) -> Described:
    """What the quantization_config of a folder says. Raises CheckpointError for one that cannot be read."""
    parsed = Config.parse(config)
    activations, kv = (None if entry is None else entry.grid for entry in (parsed.activations, parsed.keys_values))
    unlike = {name: Departure(linear.tile, linear.outliers) for name, linear in parsed.exceptions.items()}
    tile = Tile(*parsed.weights.tile, ragged=parsed.weights.signed_scale)
    grids = {name: parsed.grid(name) for name, linear in parsed.exceptions.items() if linear.bits is not None}
    kept = parsed.modules_to_not_convert
    return Described(parsed.weights.grid, activations, kv, kept, departures=unlike, tile=tile, grids=grids)


def shape(stored: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor], grid: Grid) -> tuple[int, ...]:
    """The shape of a weight, [O, I] or [E, A, B], from the shapes of its tensors or what is in them."""
    return tuple(read("weight_shape").tolist())


def read(tensors: Mapping[str, Tensor], name: str, described: Described) -> QTensor:
    """The QTensor behind the tensors that ``encode`` wrote."""
    return _read(tensors, name, described.grid_of(name))


def _read(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> QTensor:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"]
    words = tensors[f"{name}.weight_packed"]
    _check_words("weight_packed", words, (rows, ceil(columns * grid.bits / WORD_BITS)))
    codes, zero = unpack(words, grid, columns), None
    if grid.zero is Zero.REAL:
        zero = tensors[f"{name}.weight_minimum"]
    elif not grid.symmetric:
        words = tensors[f"{name}.weight_zero_point"]
        _check_words("weight_zero_point", words, (ceil(len(scale) * grid.bits / WORD_BITS), scale.shape[1]))
        zero = unpack_down(words, grid, len(scale))
    outliers = (tensors.get(f"{name}.outlier_index"), tensors.get(f"{name}.outlier_value"))
    tile = Tile(rows // scale.shape[0], columns // scale.shape[1])
    if f"{name}.weight_tile" in tensors:
        out, in_ = tensors[f"{name}.weight_tile"].tolist()
        tile = Tile(out, in_, ragged=True)
    return QTensor(codes, scale, zero, grid, tile, *outliers)


def _check_words(leaf: str, words: Tensor, wanted: tuple[int, int]) -> None:
    """Raise ValueError for words of another shape than the other tensors call for: fewer would be read as zeros."""
    if words.dtype != torch.int32 or tuple(words.shape) != wanted:
        raise ValueError(f"{leaf} is {words.dtype} {list(words.shape)}, the others call for int32 {list(wanted)}")


def encode_stacked(name: str, slices: Sequence[QTensor]) -> dict[str, Tensor]:
    """The tensors to write for a weight [E, A, B] that is called ``name`` on disk, one QTensor [A, B] per slice.

    Raises ValueError for slices that differ in shape, grid, tile or dtype, and for none at all.
    """
    x = stem(name)
    if len({(q.shape, q.grid, q.tile.size(q.shape), q.scale.dtype) for q in slices}) != 1:
        raise ValueError(f"{name}: {len(slices)} slices; to be stacked they need one shape, grid, tile and dtype")
    parts = [encode(x, q) for q in slices]
    kept = [0 if q.outlier_index is None else q.outlier_index.numel() for q in slices]
    stacked = [leaf for leaf in STACKED if f"{x}.{leaf}" in parts[0]]
    tensors = {f"{x}.{leaf}": torch.stack([part[f"{x}.{leaf}"] for part in parts]) for leaf in stacked}
    tensors[f"{x}.weight_shape"] = torch.tensor([len(slices), *slices[0].shape])
    if f"{x}.weight_tile" in parts[0]:
        tensors[f"{x}.weight_tile"] = parts[0][f"{x}.weight_tile"]
    if any(kept):
        for leaf in CHAINED:
            tensors[f"{x}.{leaf}"] = torch.cat([part[f"{x}.{leaf}"] for part in parts if f"{x}.{leaf}" in part])
        tensors[f"{x}.outlier_count"] = torch.tensor(kept)
    return tensors


def decode_stacked(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "E A B"]:
    """The weight [E, A, B] of this name as written, in the dtype of its scales."""
    return torch.stack([q.dequantize() for q in read_stacked(tensors, name, grid)])


def read_stacked(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> list[QTensor]:
    """The QTensors behind the tensors that ``encode_stacked`` wrote, one per slice."""
    x = stem(name)
    return [_read(part, x, grid) for part in _slices(tensors, x)]


def cut(names: Collection[str], name: str, number: int, read: ReadTensor, rows: ReadRows) -> dict[str, Tensor]:
    """The tensors of a weight [1, A, B]: one expert of a weight [E, A, B], without reading the others."""
    x, counted = stem(name), f"{stem(name)}.outlier_count"
    counts = read(counted) if counted in names else torch.zeros(number + 1, dtype=torch.int64)
    first, last = int(counts[:number].sum()), int(counts[: number + 1].sum())
    tensors = dict[str, Tensor]()
    for leaf in (leaf for leaf in LEAVES if f"{x}.{leaf}" in names):
        if leaf in STACKED:
            tensors[f"{x}.{leaf}"] = rows(f"{x}.{leaf}", number, number + 1)
        elif leaf in CHAINED:
            tensors[f"{x}.{leaf}"] = rows(f"{x}.{leaf}", first, last)
        else:
            tensors[f"{x}.{leaf}"] = read(f"{x}.{leaf}")
    shape = tensors[f"{x}.weight_shape"]
    tensors[f"{x}.weight_shape"] = torch.cat([shape.new_ones(1), shape[1:]])
    return tensors | ({counted: counts[number : number + 1]} if counted in names else {})


def stem(name: str) -> str:
    """The name that the tensors of a weight are called after: its own, without an ending ``.weight``."""
    return name.removesuffix(".weight")


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of what ``encode`` makes without outliers, from the shape [O, I] alone; ``encode_stacked``, [E, A, B]."""
    *stack, rows, columns = shape
    numbers = len(shape) + 2 * scheme.tile.cut((rows, columns))
    return prod(stack) * packed_bits((rows, columns), scheme.weight, scheme.tile, dtype) // 8 + SIZE_BYTES * numbers


def packed(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype, outliers: int) -> int:
    """Bits of the codes, scales, zero points and outliers of a weight [O, I] or [E, A, B]."""
    *stack, rows, columns = shape
    alone = packed_bits((rows, columns), scheme.weight, scheme.tile, dtype)
    counts = 8 * SIZE_BYTES * prod(stack) if stack and outliers else 0  # how many outliers each slice has
    return prod(stack) * alone + outliers * (8 * dtype.itemsize + OUTLIER_INDEX_BITS) + counts


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json."""
    scheme = model.scheme
    return Config(
        quant_method="bitwright",
        version=1,
        weights=Weights(
            bits=scheme.weight.bits,
            symmetric=scheme.weight.symmetric,
            signed_scale=scheme.weight.signed_scale,
            real_minimum=scheme.weight.zero is Zero.REAL,
            tile=(scheme.tile.out, scheme.tile.in_),
            dtype=DTYPES[model.dtype],
        ),
        exceptions=dict(_exceptions(model)),
        activations=_integers(scheme.activations),
        queries=_integers(scheme.activations),
        keys_values=_integers(scheme.kv),
        modules_to_not_convert=model.kept,
    ).model_dump(mode="json", exclude_defaults=True)  # so that an earlier reader need not know of them


def _exceptions(model: WrittenModel) -> Iterator[tuple[str, Exceptional]]:
    """The linears that are unlike the others: in their tile, their outliers, or their grid."""
    for name in {**model.departures, **model.schemes}:
        own = model.schemes.get(name, model.scheme)
        departure = model.departures.get(name, Departure((own.tile.out, own.tile.in_), 0))
        if own.weight == model.scheme.weight:
            yield name, Exceptional(tile=departure.tile, outliers=departure.outliers)
        else:
            grid = own.weight
            real = True if grid.zero is Zero.REAL else None
            yield (
                name,
                Exceptional(
                    tile=departure.tile,
                    outliers=departure.outliers,
                    bits=grid.bits,
                    symmetric=grid.symmetric,
                    real_minimum=real,
                ),
            )


def _slices(tensors: Mapping[str, Tensor], x: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of each slice, called as those of a linear are."""
    shape, counts = tensors[f"{x}.weight_shape"], tensors.get(f"{x}.outlier_count")
    stop = 0
    for e in range(int(shape[0])):
        part = {f"{x}.{leaf}": tensors[f"{x}.{leaf}"][e] for leaf in STACKED if f"{x}.{leaf}" in tensors}
        part |= {f"{x}.weight_tile": tensors[f"{x}.weight_tile"]} if f"{x}.weight_tile" in tensors else {}
        part[f"{x}.weight_shape"] = shape[1:]
        if counts is not None and int(counts[e]):
            start, stop = stop, stop + int(counts[e])
            part |= {f"{x}.{leaf}": tensors[f"{x}.{leaf}"][start:stop] for leaf in CHAINED}
        yield part


def _integers(grid: Grid | None) -> Integers | None:
    return None if grid is None else Integers(bits=grid.bits, symmetric=grid.symmetric)


FORMAT = TensorFormat(
    name="bitwright",
    summary="transformers after import bitwright",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    packed_bits=packed,
    leaves=LEAVES,
    codes="weight_packed",
    encode=encode,
    encode_stacked=encode_stacked,
    decode_stacked=decode_stacked,
    decode=decode,
    config=quantization_config,
    reader=Reader(described=described, shape=shape, read=read, read_stacked=read_stacked, cut=cut),
    loaded_by_transformers=True,
)
