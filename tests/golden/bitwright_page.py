"""A reader of the bitwright format, written from docs/formats/bitwright.md alone: numpy, long integers, loops."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tests.golden.affine import rounded

Array = np.ndarray[Any, np.dtype[Any]]


def weight(tensors: Mapping[str, Array], name: str, config: Mapping[str, Any]) -> Array:
    """W [O, I] of a linear, as float64; floating tensors are given as float64, words as int32."""
    bits, symmetric = config["weights"]["bits"], config["weights"]["symmetric"]
    exception = config["exceptions"].get(name, {"tile": config["weights"]["tile"], "outliers": 0})
    out, in_ = (int(extent) for extent in tensors[f"{name}.weight_shape"])
    rows, columns = (whole if t == -1 else t for t, whole in zip(exception["tile"], (out, in_), strict=True))
    p, q = out // rows, in_ // columns
    scale = tensors[f"{name}.weight_scale"]
    assert scale.shape == (p, q)
    codes = np.array([numbers(row, bits, in_) for row in tensors[f"{name}.weight_packed"]])
    zeros = np.zeros((p, q), int)
    if symmetric:
        codes = codes - 2 ** (bits - 1)
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


def numbers(words: Array, bits: int, count: int) -> list[int]:
    """The first numbers of ``bits`` bits in a string of 32-bit words, the lowest bit first."""
    string = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    assert string >> (count * bits) == 0, "bits after the last code are 0"
    return [(string >> (n * bits)) & (2**bits - 1) for n in range(count)]
