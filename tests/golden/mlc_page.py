"""A reader of MLC-LLM's folders, written from docs/formats/mlc.md alone: numpy, the standard library, loops."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
PRESETS = {"q4f16_1": (4, 32), "q3f16_1": (3, 40), "q2f16_1": (2, 64), "q4f16_2": (4, 32)}
"""Bits and group."""
AWQ_PLACES = (0, 16, 4, 20, 8, 24, 12, 28)
"""The lowest bit of each of eight outputs in a word of q4f16_autoawq."""


def tensors(folder: Path) -> dict[str, Array]:
    """Every tensor as it is stored, its shard held to what the index says of it."""
    found: dict[str, Array] = {}
    index = json.loads((folder / "tensor-cache.json").read_text())
    for shard in index["records"]:
        raw = (folder / shard["dataPath"]).read_bytes()
        assert (shard["format"], len(raw), hashlib.md5(raw).hexdigest()) == (
            "raw-shard",
            shard["nbytes"],
            shard["md5sum"],
        )
        assert len(shard["records"]) == 1 or len(raw) <= 32 * 2**20
        at = 0
        for one in shard["records"]:
            assert (one["format"], one["byteOffset"]) == ("raw", at)
            part = np.frombuffer(raw[at : at + one["nbytes"]], dtype={"uint32": "<u4", "float16": "<f2"}[one["dtype"]])
            assert one["name"] not in found
            found[one["name"]] = part.reshape(one["shape"])
            at += one["nbytes"]
        assert at == len(raw)
    said = index["metadata"]
    assert (said["ParamSize"], said["ParamBytes"]) == (len(found), sum(t.nbytes for t in found.values()))
    return found


def weight(stored: dict[str, Array], name: str, preset: str, columns: int) -> Array:
    """A matrix [N, columns] in float16, as MLC computes it."""
    if f"{name}.weight" in stored:
        return stored[f"{name}.weight"]
    if preset == "q4f16_autoawq":
        return awq(stored, name)
    bits, group = PRESETS[preset]
    words, scales = stored[f"{name}.q_weight"], stored[f"{name}.q_scale"]
    in_word, off, groups = 32 // bits, 2 ** (bits - 1) - 1, -(-columns // group)
    assert words.shape == (len(words), groups * group // in_word) and scales.shape == (len(words), groups)
    assert in_word * bits == 32 or not np.any(words >> np.uint32(in_word * bits)), "bits after the last code are 0"
    every = np.arange(groups * group)
    codes = (words[:, every // in_word] >> (every % in_word * bits).astype(np.uint32)) & np.uint32(2**bits - 1)
    assert not np.any(codes[:, columns:]), "codes past the last weight are 0"
    levels = codes[:, :columns].astype(np.float16) - np.float16(off)
    return levels * scales[:, np.arange(columns) // group]


def awq(stored: dict[str, Array], name: str) -> Array:
    """A matrix of q4f16_autoawq, in groups of 128."""
    codes, zeros = (unpacked(stored[f"{name}.{leaf}"]) for leaf in ("qweight", "qzeros"))
    group = np.arange(codes.shape[1]) // 128
    return (codes - zeros[:, group]) * stored[f"{name}.scales"].T[:, group]


def unpacked(words: Array) -> Array:
    """[C, O / 8] words to [O, C] numbers in float16."""
    numbers = [(words >> np.uint32(place)) & np.uint32(15) for place in AWQ_PLACES]
    return np.stack(numbers, axis=2).reshape(len(words), -1).T.astype(np.float16)
