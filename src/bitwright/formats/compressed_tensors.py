"""compressed-tensors, ``pack-quantized``: what transformers and vLLM load with no Bitwright installed.

Config classes are the library's own (compressed-tensors >= 0.15). Its codes are signed,
``-2**(bits-1) .. 2**(bits-1) - 1``, 32 of them in exactly ``bits`` int32 words; asymmetric codes and zero points
are shifted down by ``2**(bits-1)``, which changes no difference ``code - zero``. The tensors are those of
``formats/bitwright.py``, which can hold more; only what config.json says is this file's own. Folders of others are read
by ``_compressed_tensors_reading.py``.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor

from bitwright.core.errors import RecipeError
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import WrittenModel
from bitwright.core.scheme import FULL, Grid, Scheme, Tile
from bitwright.formats import bitwright
from bitwright.formats._compressed_tensors_reading import LEAVES, PACKED, described, read, shape
from bitwright.formats.bitwright import SCALES, decode, stored_bytes

__all__ = [
    "LEAVES",
    "SCALES",
    "decode",
    "described",
    "encode",
    "encode_stacked",
    "holds",
    "quantization_config",
    "queries_left_out",
    "read",
    "shape",
    "stored_bytes",
]

INSTEAD = (
    "compressed-tensors holds neither groups along the output nor outliers, one tile for all linears, and no grid that "
    "is an engine's own. Leave --format out, or take --format bitwright (transformers loads it after 'import "
    "bitwright') or --format dense"
)


HOLDS = "2 to 8 bits, symmetric or not, per channel or in groups along the input, the same for all linears"


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return tile.out == 1 and not (outliers or grid.signed_scale or tile.ragged)


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear. Raises RecipeError for what the format cannot hold."""
    if not holds(weight.grid, weight.tile, weight.outlier_index is not None):
        raise RecipeError(f"{name}: {INSTEAD}")
    return bitwright.encode(name, weight)


def encode_stacked(name: str, slices: Sequence[QTensor]) -> NoReturn:
    """Raises RecipeError: the format's tensors are two-dimensional."""
    raise RecipeError(
        f"{name}: compressed-tensors holds no weight that is fused over {len(slices)} experts. Leave --format out, or "
        "take --format bitwright (transformers loads it after 'import bitwright') or --format dense"
    )


def quantization_config(model: WrittenModel) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json, made by the library's classes. Raises RecipeError for linears that
    are not all alike.

    Activations are quantized per token, keys and values (and queries) per token and head: dynamic ``group`` with
    group_size = head_dim. The library's ``token`` strategy on keys would share one scale over the sequence.
    """
    if model.departures:
        raise RecipeError(f"{next(iter(model.departures))}: {INSTEAD}")
    scheme, family = model.scheme, model.family
    groups = {"group_0": _linears(scheme, ["Linear"], None)}
    kv = None if scheme.kv is None else _dynamic(scheme.kv, model.head_dim)
    if scheme.activations is not None and family is not None:
        # The library takes dimensions 0 and 1 of an input for batch and token: rows of a matrix would share a scale.
        rows = [_linears(scheme, [f"re:.*{name}$"], width) for name, width in family.flattened]
        groups = {f"group_{n}": group for n, group in enumerate([*rows, *groups.values()])}
        if queries_left_out(scheme) is None:
            groups["attention"] = QuantizationScheme(targets=[family.attention_class], input_activations=kv)
            kv = None
    config = QuantizationConfig(
        config_groups=groups,
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(model.kept),
        kv_cache_scheme=kv,
    )
    written = dict(config.to_dict())
    if scheme.activations is None and scheme.kv is None:
        # Ordinary weights once loaded. transformers 5.23.0 with compressed-tensors >= 0.18 loads packed zero points
        # in no other way, earlier ones and vLLM pass over the key (docs/decisions.md).
        written["dequantize"] = True
    return written


def queries_left_out(scheme: Scheme) -> Grid | None:
    """The grid of the queries where the config has no place for it.

    An attention's entry gives queries, keys and values one grid; ``kv_cache_scheme`` leaves the queries alone.
    """
    return None if scheme.kv == scheme.activations else scheme.activations


def _linears(scheme: Scheme, targets: list[str], features: int | None) -> QuantizationScheme:
    """One config group; activations per token, or, the same said so that it holds for rows too, per ``features``."""
    group = None if scheme.tile.in_ == FULL else scheme.tile.in_
    weights = QuantizationArgs(
        num_bits=scheme.weight.bits,
        symmetric=scheme.weight.symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )
    inputs = None if scheme.activations is None else _dynamic(scheme.activations, features)
    # Named, because with activations transformers would otherwise infer one code per byte.
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs, format=PACKED)


def _dynamic(grid: Grid, group: int | None) -> QuantizationArgs:
    strategy = "token" if group is None else "group"
    return QuantizationArgs(
        num_bits=grid.bits, symmetric=grid.symmetric, strategy=strategy, group_size=group, dynamic=True
    )
