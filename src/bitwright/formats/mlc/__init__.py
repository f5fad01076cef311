"""MLC-LLM's own folders: weights in its presets, and what its engine has to know (docs/formats/mlc.md).

``tensor-cache.json`` and ``params_shard_N.bin`` (``shards.py``), ``mlc-chat-config.json`` (``chat.py``), the
tokenizer's files. ``presets.py`` has the presets, ``architectures.py`` the names of tensors, ``writing.py`` puts a
model down, ``reading.py`` reads one. A phone needs a library beside the folder, which MLC compiles for the same
architecture and preset.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat, Foreseen, WriteOptions
from bitwright.core.grid import Grid, Tile
from bitwright.core.scheme import Scheme
from bitwright.formats import awq
from bitwright.formats.mlc import architectures, chat
from bitwright.formats.mlc.beforehand import FLOAT16, HOLDS, check_weights, preset_of
from bitwright.formats.mlc.cache import INDICES
from bitwright.formats.mlc.possible import impossible
from bitwright.formats.mlc.presets import AUTOAWQ, PRESETS
from bitwright.formats.mlc.reading import opened
from bitwright.formats.mlc.writing import write

MARKS = (chat.CONFIG, *INDICES)
"""Files of which a folder of MLC-LLM has at least one."""


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return not outliers and any(preset.holds(grid, tile) for preset in (*PRESETS, AUTOAWQ))


def recognizes(path: Path) -> bool:
    """Whether a folder is MLC-LLM's: it has one of its files, and no config.json."""
    return any((path / mark).is_file() for mark in MARKS) and not (path / "config.json").is_file()


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise RecipeError for a weight that is fused over experts."""
    if len(shape) > 2:
        raise RecipeError("format mlc holds no weight that is fused over experts")


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """The bytes of a linear's tensors, from its shape [O, I] alone. Raises RecipeError for fused experts."""
    check_shape("", shape)
    if AUTOAWQ.holds(scheme.weight, scheme.tile):
        return awq.stored_bytes(shape, replace(scheme, tile=AUTOAWQ.scheme.tile), dtype)
    words, scales = preset_of(scheme.weight, scheme.tile).stored("", (shape[0], shape[1])).values()
    return torch.int32.itemsize * prod(words) + torch.float16.itemsize * prod(scales)


def check(config: Mapping[str, Any], folder: Path, options: WriteOptions, foreseen: Foreseen | None = None) -> None:
    """Refuse, before the work, what MLC-LLM cannot run, and options that make no sense.

    If weights are foreseen, those are refused that it has no preset or no place for. Raises UserError.
    """
    decoder = architectures.checked(config)
    if wrong := impossible(chat.chat_config(config, decoder, folder, "", options.base), known=True):
        raise RecipeError(
            f"MLC-LLM cannot compute with what config.json, generation_config.json or --base say: {wrong[0]}; compare "
            f"{folder} with the original repository"
        )
    if options.embeddings not in (None, FLOAT16):
        raise RecipeError(
            f"format mlc has no embeddings in {options.embeddings}: leave it out, they are quantized like the linears, "
            f"or take --embeddings {FLOAT16} with 4 bits (MLC's q4f16_2)"
        )
    if foreseen is not None:
        check_weights(decoder, folder, options, foreseen)


FORMAT = FileFormat(
    name="mlc",
    summary="MLC-LLM",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    scales=torch.float16,
    models=tuple(architectures.ARCHITECTURES),
    check_shape=check_shape,
    mixes=False,
    single=False,
    suffix="-mlc",
    what="a folder of MLC-LLM",
    recognizes=recognizes,
    check=check,
    write=write,
    open=opened,
    next_step="mlc_llm chat {output}, or compile it for a phone (docs/formats/mlc.md)",
)
