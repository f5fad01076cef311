"""AWQ's ``gemm`` layout, as AutoAWQ writes it: what vLLM, GPTQModel and MLC-LLM (q4f16_autoawq) load.

Tensors of a linear X [O, I] with Q groups along the input: ``X.qweight`` int32 [I, O / 8], the codes of each input
channel, eight outputs in a word; ``X.qzeros`` int32 [Q, O / 8], zero points in the same way, as they are; ``X.scales``
float16 [Q, O]. In a word outputs 0, 2, 4, 6, 1, 3, 5, 7 follow one another from the lowest bit on. Codes and zero
points are 0 to 15, and always asymmetric; a symmetric grid is written with the zero point 8.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import Reader, TensorFormat
from bitwright.core.grid import Grid, Tile
from bitwright.core.packing import pack, unpack
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, WrittenModel
from bitwright.core.scheme import Scheme
from bitwright.formats.gptq import (
    INSTEAD,
    WORD_BYTES,
    check_shapes,
    half,
    on_grid,
    refuse_scheme,
    refuse_sizes,
    rules_for_kept,
    tile_of,
)

BITS, IN_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The order of eight outputs in a word, from the lowest bits on."""
LEAVES = ("qweight", "qzeros", "scales")
"""How the names of a weight's tensors end; the first is always there."""
HOLDS = "4 bits, per channel or in groups along the input"
"""What the format holds, in words."""
READABLE = "of awq folders, Bitwright reads version gemm with 4 bits and zero points"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return grid.bits == BITS and tile.out == 1 and not (outliers or tile.ragged or not grid.plain)


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear. Raises RecipeError for what the format cannot hold."""
    if not holds(weight.grid, weight.tile, weight.outlier_index is not None):
        raise RecipeError(f"{name}: awq holds 4 bits, and neither groups along the output nor outliers. {INSTEAD}")
    check_shape(name, weight.shape)
    middle = torch.full_like(weight.scale, IN_WORD, dtype=torch.uint8)
    zero = middle if weight.zero is None else weight.zero
    codes = weight.codes + IN_WORD if weight.grid.symmetric else weight.codes
    return {
        f"{name}.qweight": _words(codes.to(torch.uint8)),
        f"{name}.qzeros": _words(zero),
        f"{name}.scales": half(name, weight).t().contiguous(),
    }


def decode(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "O I"]:
    """The weight [O, I] of one linear as written, in float16."""
    return read(tensors, name, Described(grid)).dequantize()


def described(config: Mapping[str, Any]) -> Described:
    """What the quantization_config of a folder says. Raises CheckpointError for what cannot be read: ``READABLE``."""
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != BITS or version != "gemm" or not config.get("zero_point", True):
        raise CheckpointError(
            f"version {version}, {bits!r} bits, zero_point {config.get('zero_point', True)!r}; {READABLE}"
        )
    kept, group = tuple(config.get("modules_to_not_convert") or ()), config.get("group_size")
    return Described(
        Grid.integers(BITS), kept=kept, tile=tile_of(config.get("q_group_size") if group is None else group)
    )


def shape(stored: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor], grid: Grid) -> tuple[int, ...]:
    """The shape of a weight [O, I], from the shapes of its tensors."""
    columns, words = stored("qweight")
    return words * IN_WORD, columns


def read(tensors: Mapping[str, Tensor], name: str, described: Described) -> QTensor:
    """The QTensor of one linear, whoever wrote it."""
    scale = tensors[f"{name}.scales"].t().contiguous()
    (rows, groups), columns = scale.shape, len(tensors[f"{name}.qweight"])
    words = rows // IN_WORD
    check_shapes(tensors, name, {"qweight": (columns, words), "qzeros": (groups, words)})
    codes, zero = (_numbers(tensors[f"{name}.{leaf}"]) for leaf in ("qweight", "qzeros"))
    return on_grid(codes, scale, zero, described.grid_of(name), Tile(1, columns // groups))


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise RecipeError for a weight whose outputs do not fill whole words, or that is fused over experts."""
    refuse_sizes(name, shape, (IN_WORD, 1), "awq")


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of what ``encode`` makes, from the shape [O, I] alone."""
    rows, columns = shape
    groups = Tile(1, scheme.tile.in_).counts((rows, columns))[1]
    return WORD_BYTES * (columns + groups) * rows // IN_WORD + torch.float16.itemsize * rows * groups


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json.

    Raises RecipeError for activations, bits other than 4, and linears that are not all alike.

    ``dynamic`` is for GPTQModel, which takes no notice of ``modules_to_not_convert``; ``lm_head`` for vLLM.
    """
    scheme = model.scheme
    refuse_scheme(model, "awq")
    for name, own in model.schemes.items():
        raise RecipeError(f"{name}: awq has one scheme for all linears, {scheme}, and this is to have {own}")
    if scheme.weight.bits != BITS:
        raise RecipeError(f"awq holds 4 bits, scheme {scheme} asks for {scheme.weight.bits}; take --format gptq")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": scheme.tile.in_,
        "zero_point": True,
        "modules_to_not_convert": list(model.kept),
        **rules_for_kept(model.kept),
    }


def _words(numbers: Int[Tensor, "O C"]) -> Int32[Tensor, "C W"]:
    columns = numbers.t().reshape(numbers.shape[1], -1, IN_WORD)[..., list(ORDER)]
    return pack(columns.reshape(numbers.shape[1], -1), Grid.integers(BITS))


def _numbers(words: Int32[Tensor, "C W"]) -> Int[Tensor, "O C"]:
    columns, count = words.shape
    stored = unpack(words.contiguous(), Grid.integers(BITS), count * IN_WORD).view(columns, count, IN_WORD)
    places = [ORDER.index(number) for number in range(IN_WORD)]
    return stored[..., places].reshape(columns, -1).t().contiguous()


FORMAT = TensorFormat(
    name="awq",
    summary="vLLM, GPTQModel, transformers with gptqmodel",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    scales=torch.float16,
    check_shape=check_shape,
    weights_only=True,
    mixes=False,
    leaves=LEAVES,
    codes="qweight",
    encode=encode,
    decode=decode,
    config=quantization_config,
    reader=Reader(described=described, shape=shape, read=read),
)
