"""compressed-tensors, ``pack-quantized``: what transformers and vLLM load with no Bitwright installed.

Packing and config classes are the library's own (compressed-tensors >= 0.15). Its codes are signed,
``-2**(bits-1) .. 2**(bits-1) - 1``, 32 of them in exactly ``bits`` int32 words; asymmetric codes and zero points
are shifted down by ``2**(bits-1)``, which changes no difference ``code - zero``. Zero points are packed along the
output dimension. Names: ``X.weight_packed``, ``X.weight_scale``, ``X.weight_zero_point``, ``X.weight_shape``.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from jaxtyping import Float, Int
from torch import Tensor

from bitwright.core.block import Family
from bitwright.core.errors import RecipeError
from bitwright.core.qtensor import QTensor
from bitwright.core.scheme import FULL, Grid, Scheme, Tile

WORD_BITS = 32
SHAPE_BYTES = 2 * 8


def encode(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors to write for one linear. Raises RecipeError for what the format cannot hold."""
    if weight.tile.out != 1 or weight.outlier_index is not None:
        raise RecipeError(f"{name}: compressed-tensors holds neither groups along the output nor outliers; use dense")
    bits = weight.grid.bits
    tensors = {
        f"{name}.weight_packed": pack_to_int32(_signed(weight.codes, weight.grid), bits),
        f"{name}.weight_scale": weight.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(_signed(weight.zero, weight.grid), bits, packed_dim=0)
    return tensors


def decode(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> Float[Tensor, "O I"]:
    """The weight [O, I] of one linear as written, in the dtype of its scales."""
    return read(tensors, name, scheme.weight, scheme.tile).dequantize()


def read(tensors: Mapping[str, Tensor], name: str, grid: Grid, tile: Tile) -> QTensor:
    """The QTensor behind the tensors that ``encode`` wrote."""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    scale = tensors[f"{name}.weight_scale"]
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], grid.bits, shape)
    zero = None
    if not grid.symmetric:
        packed = tensors[f"{name}.weight_zero_point"]
        zero = _own(unpack_from_int32(packed, grid.bits, scale.shape, packed_dim=0), grid)
    return QTensor(_own(codes, grid), scale, zero, grid, tile)


def stored_bytes(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of one linear's tensors: what ``encode`` makes, known from the shape [O, I] alone."""
    (rows, columns), (p, q), bits = shape, scheme.tile.counts(shape), scheme.weight.bits
    zeros = 0 if scheme.weight.symmetric else ceil(p * bits / WORD_BITS) * q
    words = rows * ceil(columns * bits / WORD_BITS) + zeros
    return words * WORD_BITS // 8 + p * q * dtype.itemsize + SHAPE_BYTES


def quantization_config(scheme: Scheme, family: Family, head_dim: int, quantize_lm_head: bool) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json, made by the library's classes.

    Activations are quantized per token, keys and values (and queries) per token and head: dynamic ``group`` with
    group_size = head_dim. The library's ``token`` strategy on keys would share one scale over the sequence.
    """
    groups = {"group_0": _linears(scheme, ["Linear"], None)}
    kv = None if scheme.kv is None else _dynamic(scheme.kv, head_dim)
    if scheme.activations is not None:
        # The library takes dimensions 0 and 1 of an input for batch and token: rows of a matrix would share a scale.
        rows = [_linears(scheme, [f"re:.*{name}$"], width) for name, width in family.flattened]
        groups = {f"group_{n}": group for n, group in enumerate([*rows, *groups.values()])}
        if queries_left_out(scheme) is None:
            groups["attention"] = QuantizationScheme(targets=[family.attention_class], input_activations=kv)
            kv = None
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[] if quantize_lm_head else [family.head],
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
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs, format="pack-quantized")


def _dynamic(grid: Grid, group: int | None) -> QuantizationArgs:
    strategy = "token" if group is None else "group"
    return QuantizationArgs(
        num_bits=grid.bits, symmetric=grid.symmetric, strategy=strategy, group_size=group, dynamic=True
    )


def _signed(codes: Int[Tensor, "O I"], grid: Grid) -> Int[Tensor, "O I"]:
    if grid.symmetric:
        return codes
    return torch.sub(codes.to(torch.int16), 2 ** (grid.bits - 1)).to(torch.int8)


def _own(codes: Int[Tensor, "O I"], grid: Grid) -> Int[Tensor, "O I"]:
    if grid.symmetric:
        return codes
    return torch.add(codes.to(torch.int16), 2 ** (grid.bits - 1)).to(torch.uint8)
