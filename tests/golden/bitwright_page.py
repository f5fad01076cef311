"""A reader of the bitwright format, written from docs/formats/bitwright.md alone: numpy, long integers, loops."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tests.golden.affine import rounded

Array = np.ndarray[Any, np.dtype[Any]]
STACKED = ("weight_packed", "weight_scale", "weight_zero_point")


def weight(tensors: Mapping[str, Array], name: str, config: Mapping[str, Any]) -> Array:
    """W [O, I] of a linear, as float64; floating tensors are given as float64, words as int32."""
    bits, symmetric = config["weights"]["bits"], config["weights"]["symmetric"]
    exception = config["exceptions"].get(name, {"tile": config["weights"]["tile"], "outliers": 0})
    out, in_ = (int(extent) for extent in tensors[f"{name}.weight_shape"])
    rows, columns = (whole if t == -1 else t for t, whole in zip(exception["tile"], (out, in_), strict=True))
    sign = config["weights"].get("signed_scale", False)
    p, q = out // rows, -(-in_ // columns) if sign else in_ // columns
    assert (in_ % columns == 0) == (f"{name}.weight_tile" not in tensors)
    assert in_ % columns == 0 or tensors[f"{name}.weight_tile"].tolist() == [rows, columns]
    scale = tensors[f"{name}.weight_scale"]
    assert scale.shape == (p, q)
    codes = np.array([numbers(row, bits, in_) for row in tensors[f"{name}.weight_packed"]])
    zeros = np.zeros((p, q), int)
    if symmetric:
        codes = codes - 2 ** (bits - 1) + sign
    else:
        zeros = np.array([numbers(column, bits, p) for column in tensors[f"{name}.weight_zero_point"].T]).T
    values = np.array(
        [[(codes[o, i] - zeros[o // rows, i // columns]) * scale[o // rows, i // columns] for i in range(in_)]
         for o in range(out)]
    )  # fmt: skip
    values = rounded(values, config["weights"]["dtype"])
    if exception["outliers"]:
        assert len(tensors[f"{name}.outlier_index"]) == exception["outliers"]
        for place, value in zip(tensors[f"{name}.outlier_index"], tensors[f"{name}.outlier_value"], strict=True):
            values[place // in_, place % in_] = value
    return values


def stacked_weight(tensors: Mapping[str, Array], name: str, config: Mapping[str, Any]) -> Array:
    """W [E, A, B] of a weight of this name that is fused over experts, as float64."""
    x = name.removesuffix(".weight")
    slices, *shape = (int(extent) for extent in tensors[f"{x}.weight_shape"])
    exception = config["exceptions"].get(x, {"tile": config["weights"]["tile"], "outliers": 0})
    kept = [int(k) for k in tensors[f"{x}.outlier_count"]] if exception["outliers"] else [0] * slices
    assert len(kept) == slices and sum(kept) == exception["outliers"]
    found = []
    for e in range(slices):
        parts = {end: tensors[f"{x}.{end}"][e] for end in STACKED if f"{x}.{end}" in tensors}
        parts["weight_shape"] = np.array(shape)
        parts |= {"weight_tile": tensors[f"{x}.weight_tile"]} if f"{x}.weight_tile" in tensors else {}
        own = slice(sum(kept[:e]), sum(kept[: e + 1]))
        parts |= {end: tensors[f"{x}.{end}"][own] for end in ("outlier_index", "outlier_value") if kept[e]}
        said = {**config, "exceptions": {"slice": {"tile": exception["tile"], "outliers": kept[e]}}}
        found.append(weight({f"slice.{end}": part for end, part in parts.items()}, "slice", said))
    return np.array(found)


def numbers(words: Array, bits: int, count: int) -> list[int]:
    """The first numbers of ``bits`` bits in a string of 32-bit words, the lowest bit first."""
    string = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    assert string >> (count * bits) == 0, "bits after the last code are 0"
    return [(string >> (n * bits)) & (2**bits - 1) for n in range(count)]
