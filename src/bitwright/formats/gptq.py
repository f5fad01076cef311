"""GPTQ, as GPTQModel and AutoGPTQ write it: what GPTQModel, vLLM and transformers (through GPTQModel) load.

Tensors of a linear X [O, I] with Q groups along the input: ``X.qweight`` int32 [I * bits / 32, O], the codes of each
output channel from the first input on, lowest bit first; ``X.qzeros`` int32 [Q, O * bits / 32], the zero points of a
group in the same way; ``X.scales`` float16 [Q, O]; ``X.g_idx`` int32 [I], the group of each input. Codes are 0 to
2**bits - 1 and symmetric ones have the zero point 2**(bits-1). Version 1 stores a zero point less one, so that 0 wraps;
version 2 (``checkpoint_format: gptq_v2``) stores it as it is.

Symmetric grids are written in version 1, which everybody reads, asymmetric ones in version 2. GPTQModel adds the one
of version 1 to whole words, in which a zero point 0 would run over into its neighbour, and refuses asymmetric folders
of version 1 that it has not written itself; vLLM takes symmetric ones alone (docs/formats/gptq.md).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from bitwright.core.decoder import HEAD
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import Reader, TensorFormat, refuse_stacked
from bitwright.core.grid import FULL, Grid, Tile
from bitwright.core.packing import pack, unpack
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, WrittenModel
from bitwright.core.scheme import Scheme

BITS = (2, 3, 4, 8)
MULTIPLE = 32
"""Inputs and outputs come in whole words of codes."""
V1, V2 = "gptq", "gptq_v2"
LEAVES = ("qweight", "qzeros", "scales", "g_idx")
"""How the names of a weight's tensors end; the first is always there."""
HOLDS = "2, 3, 4 or 8 bits, per channel or in groups along the input"
"""What the format holds, in words."""
WORD_BITS, WORD_BYTES = 32, 4
READABLE = "of gptq folders, Bitwright reads versions gptq and gptq_v2 with codes of 2, 3, 4 or 8 bits in int32 words"
INSTEAD = "Leave --format out, or take --format bitwright (transformers loads it after 'import bitwright')"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return grid.bits in BITS and tile.out == 1 and not (outliers or tile.ragged or not grid.plain)


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear. Raises RecipeError for what the format cannot hold."""
    if not holds(weight.grid, weight.tile, weight.outlier_index is not None):
        raise RecipeError(
            f"{name}: gptq holds {', '.join(map(str, BITS))} bits and groups along the input, found {weight.grid.bits} "
            f"bits and tiles of {weight.tile.out} x {weight.tile.in_}"
            f"{'' if weight.outlier_index is None else ', with outliers'}. {INSTEAD}"
        )
    check_shape(name, weight.shape)
    bits, columns = weight.grid.bits, weight.shape[1]
    middle = torch.full_like(weight.scale, 2 ** (bits - 1), dtype=torch.uint8)
    zero = middle if weight.zero is None else weight.zero
    stored = (zero - 1) & (2**bits - 1) if weight.grid.symmetric else zero
    return {
        f"{name}.qweight": pack(weight.codes, weight.grid).t().contiguous(),
        f"{name}.qzeros": pack(stored.t().contiguous(), Grid.integers(bits)),
        f"{name}.scales": half(name, weight).t().contiguous(),
        f"{name}.g_idx": _groups(columns, weight.scale.shape[1]),
    }


def decode(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> Float[Tensor, "O I"]:
    """The weight [O, I] of one linear as ``encode`` wrote it, in float16."""
    return read(tensors, name, Described(grid, variant=_version(grid))).dequantize()


def described(config: Mapping[str, Any]) -> Described:
    """What the quantization_config of a folder says. Raises CheckpointError for what cannot be read: ``READABLE``."""
    layout = config.get("checkpoint_format") or config.get("format") or V1
    words = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if layout not in (V1, V2) or words != "int32" or config.get("is_marlin_format"):
        kind = "marlin" if config.get("is_marlin_format") else layout
        raise CheckpointError(f"checkpoint_format {kind}, codes in {words} words; {READABLE}")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"its rules ('dynamic') are {dynamic!r:.60}, not a table; {READABLE}")
    rules = {
        pattern.removeprefix("+:"): {**config, **rule}
        for pattern, rule in dynamic.items()
        if not pattern.startswith("-:") and isinstance(rule, dict)
    }
    named = {name: rule for pattern, rule in rules.items() if (name := _name_of(pattern)) is not None}
    patterns = {pattern: rule for pattern, rule in rules.items() if _name_of(pattern) is None}
    return Described(
        _grid(config),
        variant=layout,
        rules=tuple((pattern, _grid(rule)) for pattern, rule in patterns.items()),
        tile=tile_of(config.get("group_size")),
        tiles=tuple((pattern, tile_of(rule.get("group_size"))) for pattern, rule in patterns.items()),
        grids={name: _grid(rule) for name, rule in named.items()},
        named_tiles={name: tile_of(rule.get("group_size")) for name, rule in named.items()},
    )


def _name_of(pattern: str) -> str | None:
    """The name that a pattern of Bitwright's own stands for; None for any other regular expression."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
    return name if pattern == f"^{re.escape(name)}$" else None


def tile_of(group: Any) -> Tile | None:
    """The tile of a group_size: -1 is one group per channel; None if there is no group_size.

    Raises CheckpointError for anything that is not the size of a group.
    """
    if group is None:
        return None
    if not isinstance(group, int) or isinstance(group, bool) or not (group == FULL or group > 0):
        raise CheckpointError(
            f"its group_size is {group!r:.60}, and a group has 1 input feature at least (-1 is one group per channel); "
            "its quantization_config is damaged, download or quantize it again"
        )
    return Tile(1, group)


def shape(stored: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor], grid: Grid) -> tuple[int, ...]:
    """The shape of a weight [O, I], from the shapes of its tensors."""
    words, rows = stored("qweight")
    return rows, words * WORD_BITS // grid.bits


def read(tensors: Mapping[str, Tensor], name: str, described: Described) -> QTensor:
    """The QTensor of one linear, whoever wrote it.

    One that is called symmetric and is not, by its zero points, is read on an asymmetric grid. Raises CheckpointError
    for input channels that are sorted into groups out of order (``desc_act`` with groups).
    """
    grid, scale = described.grid_of(name), tensors[f"{name}.scales"].t().contiguous()
    words = tensors[f"{name}.qweight"].t().contiguous()
    (rows, groups), columns = scale.shape, words.shape[1] * WORD_BITS // grid.bits
    check_shapes(tensors, name, {"qweight": (words.shape[1], rows), "qzeros": (groups, rows * grid.bits // WORD_BITS)})
    check_order(name, tensors.get(f"{name}.g_idx"), columns, groups)
    plain = Grid.integers(grid.bits)
    zero = unpack(tensors[f"{name}.qzeros"], plain, rows).t().contiguous()
    if described.variant != V2:
        zero = (zero + 1) & plain.qmax
    codes = unpack(words, plain, columns)
    return on_grid(codes, scale, zero, grid, Tile(1, columns // groups))


def check_shapes(tensors: Mapping[str, Tensor], name: str, wanted: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError for words of another shape than the scales call for."""
    for leaf, shape in wanted.items():
        words = tensors[f"{name}.{leaf}"]
        if words.dtype != torch.int32 or tuple(words.shape) != shape:
            raise ValueError(f"{leaf} is {words.dtype} {list(words.shape)}, the others call for int32 {list(shape)}")


def on_grid(
    codes: Int[Tensor, "O I"], scale: Float[Tensor, "O Q"], zero: Int[Tensor, "O Q"], grid: Grid, tile: Tile
) -> QTensor:
    """A linear of unsigned codes: symmetric if the grid says so and every zero point lies in the middle.

    Tensors without data have no middle.
    """
    middle = 2 ** (grid.bits - 1)
    if not grid.symmetric or zero.is_meta or not bool((zero == middle).all()):
        return QTensor(codes, scale, zero, Grid.integers(grid.bits), tile)
    return QTensor((codes - middle).view(torch.int8), scale, None, grid, tile)


def half(name: str, weight: QTensor) -> Float[Tensor, "O Q"]:
    """The scales in float16, none of them 0 that was not. Raises RecipeError if a weight would be infinite."""
    stored = weight.scale.to(torch.float16)
    furthest = -weight.grid.qmin if weight.grid.symmetric else weight.grid.steps
    if not bool((stored * furthest).isfinite().all()):
        raise RecipeError(
            f"{name}: a scale of {float(weight.scale.abs().max()):.4g} is too large for float16, in which this format "
            f"stores scales and its clients compute. {INSTEAD}"
        )
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    return torch.where((stored == 0) & (weight.scale != 0), smallest, stored)


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise RecipeError for a weight whose sizes do not fill whole words, or that is fused over experts."""
    refuse_sizes(name, shape, (MULTIPLE, MULTIPLE), "gptq")


def refuse_sizes(name: str, shape: tuple[int, ...], multiples: tuple[int, int], format: str) -> None:
    """Raise RecipeError for a weight that is not [O, I], or whose sizes are not multiples of ``multiples``."""
    if len(shape) > 2:
        refuse_stacked(name, range(shape[0]), format)
    for size, multiple, which in zip(shape, multiples, ("output", "input"), strict=True):
        if size % multiple:
            raise RecipeError(
                f"{name} {list(shape)}: {size} {which} features are no multiple of {multiple}, as {format} packs them. "
                "Take --format compressed-tensors or --format bitwright"
            )


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of what ``encode`` makes, from the shape [O, I] alone."""
    rows, columns = shape
    groups = Tile(1, scheme.tile.in_).counts((rows, columns))[1]
    words = rows * (columns + groups) * scheme.weight.bits // WORD_BITS
    return WORD_BYTES * (words + columns) + torch.float16.itemsize * rows * groups


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json.

    Raises RecipeError for activations, and for linears that are not all alike.
    """
    scheme = model.scheme
    refuse_scheme(model, "gptq")
    for asked in (scheme, *model.schemes.values()):
        if asked.weight.bits not in BITS:
            raise RecipeError(f"gptq holds {', '.join(map(str, BITS))} bits, scheme {asked} asks for others. {INSTEAD}")
    return {
        "quant_method": "gptq",
        "checkpoint_format": _version(scheme.weight),
        "bits": scheme.weight.bits,
        "group_size": scheme.tile.in_,
        "sym": scheme.weight.symmetric,
        "desc_act": False,
        "pack_dtype": "int32",
        **rules(model),
        "meta": {"quantizer": [f"bitwright:{version('bitwright')}"]},
    }


def rules_for_kept(kept: Sequence[str]) -> dict[str, Any]:
    """Linears that are left alone, as rules for GPTQModel, and whether the output layer is packed.

    vLLM sees in the tensors which other linears are packed.
    """
    inside = {f"-:^{re.escape(name)}$": dict[str, Any]() for name in kept if name != HEAD}
    return {"lm_head": HEAD not in kept} | ({"dynamic": inside} if inside else {})


def rules(model: WrittenModel) -> dict[str, Any]:
    """The rules for kept linears, and one for each linear with a scheme of its own, for GPTQModel and vLLM."""
    entries = rules_for_kept(model.kept)
    own = {
        f"+:^{re.escape(name)}$": {
            "bits": scheme.weight.bits,
            "group_size": scheme.tile.in_,
            "sym": scheme.weight.symmetric,
        }
        for name, scheme in model.schemes.items()
    }
    return entries | ({"dynamic": own | entries.get("dynamic", {})} if own else {})


def refuse_scheme(model: WrittenModel, format: str) -> None:
    """Raise RecipeError for a model that neither gptq nor awq has a place for."""
    scheme = model.scheme
    if any(own.weight.symmetric != scheme.weight.symmetric for own in model.schemes.values()):
        name = next(n for n, own in model.schemes.items() if own.weight.symmetric != scheme.weight.symmetric)
        asked = f" ({model.asked[name]})" if name in model.asked else ""
        raise RecipeError(
            f"{name}: {format} has one version for symmetric and one for asymmetric weights, and {model.schemes[name]} "
            f"is not as {scheme} there{asked}; give all linears sym, or none"
        )
    if model.departures or scheme.tile.out != 1:
        first = next(iter(model.departures), f"scheme {scheme}")
        raise RecipeError(f"{first}: {format} holds neither groups along the output nor outliers. {INSTEAD}")


def _version(grid: Grid) -> str:
    return V1 if grid.symmetric else V2


def _grid(config: Mapping[str, Any]) -> Grid:
    bits = config.get("bits")
    if isinstance(bits, bool) or bits not in BITS:
        raise CheckpointError(f"codes of {bits!r} bits; {READABLE}")
    return Grid.integers(int(bits), bool(config.get("sym", True)))


def _groups(columns: int, groups: int) -> Int32[Tensor, " I"]:
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def check_order(name: str, g_idx: Tensor | None, columns: int, groups: int) -> None:
    """Raise CheckpointError for groups that are not runs of neighbouring input channels.

    Some writers leave g_idx out, or write -1 for every channel.
    """
    if g_idx is None or torch.equal(g_idx.int(), _groups(columns, groups)) or bool((g_idx == -1).all()):
        return
    raise CheckpointError(
        f"{name}: its input channels are sorted into groups out of order (desc_act with groups), and Bitwright reads "
        "groups of neighbouring channels; quantize the original again without desc_act"
    )


FORMAT = TensorFormat(
    name="gptq",
    summary="GPTQModel, vLLM, transformers with gptqmodel",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    scales=torch.float16,
    check_shape=check_shape,
    weights_only=True,
    leaves=LEAVES,
    codes="qweight",
    encode=encode,
    decode=decode,
    config=quantization_config,
    reader=Reader(described=described, shape=shape, read=read),
)
