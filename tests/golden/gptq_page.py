"""A reader of gptq and awq linears, written from docs/formats/gptq.md and awq.md alone: numpy, long integers, loops.

It takes tensors one number at a time and shares nothing with the package.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
AWQ_BITS = {0: 0, 1: 16, 2: 4, 3: 20, 4: 8, 5: 24, 6: 12, 7: 28}
"""Where in a word the output of this number (modulo 8) stands."""


def gptq_parts(tensors: Mapping[str, Array], name: str, config: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Codes [I, O], zero points [Q, O] and scales [Q, O] of a gptq linear."""
    bits = config["bits"]
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    codes = np.array([string(qweight[:, o], bits, inputs) for o in range(outputs)]).T
    zeros = np.array([string(row, bits, outputs) for row in qzeros])
    if config["checkpoint_format"] == "gptq":
        zeros = np.array([[(z + 1) % 2**bits for z in row] for row in zeros])
    return codes, zeros, tensors[f"{name}.scales"]


def gptq_weight(tensors: Mapping[str, Array], name: str, config: Mapping[str, Any]) -> Array:
    """W [O, I] as float64, each input's group looked up in g_idx."""
    codes, zeros, scales = gptq_parts(tensors, name, config)
    group = tensors[f"{name}.g_idx"]
    return np.array([(codes[i] - zeros[group[i]]) * scales[group[i]] for i in range(len(group))]).T


def awq_parts(tensors: Mapping[str, Array], name: str) -> tuple[Array, Array, Array]:
    """Codes [I, O], zero points [Q, O] and scales [Q, O] of an awq linear."""
    codes, zeros = (_awq_numbers(tensors[f"{name}.{end}"]) for end in ("qweight", "qzeros"))
    return codes, zeros, tensors[f"{name}.scales"]


def awq_weight(tensors: Mapping[str, Array], name: str, group_size: int) -> Array:
    """W [O, I] as float64."""
    codes, zeros, scales = awq_parts(tensors, name)
    size = len(codes) if group_size == -1 else group_size
    return np.array([(codes[i] - zeros[i // size]) * scales[i // size] for i in range(len(codes))]).T


def string(words: Array, bits: int, count: int) -> list[int]:
    """Numbers of so many bits in a string of 32-bit words, the lowest bit of the first word first."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words))
    assert whole >> (count * bits) == 0
    return [(whole >> (n * bits)) & (2**bits - 1) for n in range(count)]


def _awq_numbers(words: Array) -> Array:
    rows, columns = words.shape
    return np.array(
        [[((int(words[i, o // 8]) & 0xFFFFFFFF) >> AWQ_BITS[o % 8]) & 15 for o in range(columns * 8)]
         for i in range(rows)]
    )  # fmt: skip
