"""A folder of MLC-LLM, whoever wrote it, looked at and decoded: a ``core.engine_file.EngineFile``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.core.engine_file import EngineTensor, Levels, Rows, Shape, Wanted
from bitwright.core.errors import CheckpointError
from bitwright.core.json_values import parse_object
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.formats import awq
from bitwright.formats.mlc import architectures
from bitwright.formats.mlc.cache import Cache, Record, read_cache
from bitwright.formats.mlc.chat import CONFIG
from bitwright.formats.mlc.places import Home, Places, awq_leaves
from bitwright.formats.mlc.presets import (
    AUTOAWQ_GRID,
    AUTOAWQ_GROUP,
    unpacked,
)

TOGETHER = 2**22
"""Weights that are decoded at a time."""
CHOSEN = ("context_window_size", "prefill_chunk_size", "max_batch_size", "sliding_window_size", "attention_sink_size")
"""Settings that may differ from config.json: how it is to be run."""
AWQ_DESCRIBED = Described(AUTOAWQ_GRID)


def opened(path: Path) -> "MlcFolder":
    """A folder of MLC-LLM. Raises CheckpointError for one that is incomplete or damaged."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: has no {CONFIG}; copy the whole folder, or write it again")
    said = parse_object((path / CONFIG).read_bytes(), str(path / CONFIG))
    cache, settings = read_cache(path), said.get("model_config")
    blocks = settings.get("num_hidden_layers", 0) if isinstance(settings, dict) else None
    if not isinstance(blocks, int) or blocks > len(cache.records):
        raise CheckpointError(
            f"{path / CONFIG}: says there are {blocks} blocks, in {len(cache.records)} tensors; copy the folder again"
        )
    return MlcFolder(path, said, cache)


@dataclass(frozen=True)
class MlcFolder:
    """A folder whose config and index have been read."""

    path: Path
    says: Mapping[str, Any]
    cache: Cache

    @cached_property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """What it holds."""
        records = self.cache.records.items()
        return {name: EngineTensor(name, each.shape, each.dtype, each.nbytes) for name, each in records}

    @property
    def unknown(self) -> str:
        """Why the architecture is not looked at; "" where it is."""
        return self._places.unknown

    @cached_property
    def wanted(self) -> Wanted | None:
        """The tensors of the architecture."""
        return None if self.unknown else Wanted(self._places.needed())

    @cached_property
    def names(self) -> Sequence[str]:
        """The folder's tensors."""
        return tuple(name for name, home in self._places.homes.items() if self._is_there(home))

    @property
    def misfiled(self) -> str | None:
        """A shard that the index does not name, or a tokenizer's file that is missing; shards were held against the
        index when it was read."""
        named = {record.shard.name for record in self.cache.records.values()}
        more = sorted(path.name for path in self.path.glob("params_shard_*.bin") if path.name not in named)
        if more:
            return f"{more[0]} is not in the index"
        missing = [name for name in self.says.get("tokenizer_files") or () if not (self.path / str(name)).is_file()]
        return f"{missing[0]} is missing, which {CONFIG} names" if missing else None

    def numbers(self, name: str) -> str | None:
        """Whether scales, and values that are stored as they are, are finite; scales not all zero."""
        record = self.cache.records[name]
        if record.dtype not in ("float16", "float32", "bfloat16"):
            return None
        any_scale = False
        for rows in _panels(record.shape):
            numbers = _floats(record, rows)
            if not bool(numbers.isfinite().all()):
                return "NaN or infinite"
            any_scale = any_scale or bool(numbers.any())
        return "all its scales are zero" if name.endswith((".q_scale", ".scales")) and not any_scale else None

    def is_read(self, name: str) -> bool:
        """Whether it is known what the numbers are."""
        return not self.unknown or self.cache.records[name].dtype.startswith(("float", "bfloat"))

    def checksums(self) -> list[str] | None:
        """Shards unlike theirs."""
        return self.cache.changed() if self.cache.digests else None

    def bits(self) -> tuple[int, int]:
        """Of matrices in blocks of the model."""
        inside = {name: shape for name, shape in self._places.matrices.items() if ".layers." in name}
        stored = (leaf for name, shape in inside.items() for leaf in self._places.stored_as(name, shape))
        found = [self.tensors[leaf].nbytes for leaf in stored if leaf in self.tensors]
        return 8 * sum(found), sum(rows * columns for rows, columns in inside.values())

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """Settings of both that are different numbers. Raises RecipeError for an architecture that MLC does not run."""
        decoder = architectures.checked(config)
        if decoder.model_type != self.says.get("model_type"):
            return [f"model_type is {self.says.get('model_type')}, the folder's {decoder.model_type}"]
        theirs, wrong = self.says.get("model_config") or {}, []
        for key, value in architectures.model_config(decoder).items():
            found = theirs.get(key)
            if key in CHOSEN or not isinstance(found, int | float) or not isinstance(value, int | float):
                continue
            if abs(found - value) > 1e-6 * abs(value):
                wrong.append(f"{key} is {found:g}, the folder's {value:g}")
        return wrong

    def shape(self, name: str) -> Shape:
        """Of a tensor of the folder."""
        return self._places.homes[name].shape

    def values(self, name: str) -> Iterator[tuple[Rows, Tensor]]:
        """In float32, from float16 scales."""
        home = self._places.homes[name]
        plain = home.name if len(home.shape) == 1 else f"{home.name}.weight"
        if plain in self.cache.records:
            for part in _panels(home.shape):
                here = slice(part.start + home.row, part.stop + home.row)
                yield part, _floats(self.cache.records[plain], here).float()
            return
        for rows, found in self.levels(name):
            step = found.step.float().repeat_interleave(found.group, 1)[:, : home.shape[1]]
            yield rows, found.levels.float() * step

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """Of MLC's presets and AutoAWQ's layout."""
        home, records = self._places.homes[name], self.cache.records
        if f"{home.name}.qweight" in records:
            yield from _of_awq(self._awq(home.name), home)
        elif self._places.preset is not None and f"{home.name}.q_weight" in records:
            words, scales = records[f"{home.name}.q_weight"], records[f"{home.name}.q_scale"]
            for rows in _panels(home.shape):
                here = (rows.start + home.row, rows.stop + home.row)
                packed = torch.from_numpy(np.array(words.rows(*here)).view(np.int32))
                step = torch.from_numpy(np.array(scales.rows(*here)))
                levels = unpacked(packed, self._places.preset, home.shape[1])
                yield rows, Levels(levels, step, None, self._places.preset.group)

    def _awq(self, name: str) -> QTensor:
        tensors = {leaf: torch.from_numpy(np.array(self.cache.records[leaf].rows())) for leaf in awq_leaves(name)}
        words = {leaf: t if t.is_floating_point() else t.view(torch.int32) for leaf, t in tensors.items()}
        return awq.read(words, name, AWQ_DESCRIBED)

    @cached_property
    def _places(self) -> Places:
        return Places(self.says)

    def _is_there(self, home: Home) -> bool:
        if len(home.shape) == 1:
            return home.name in self.tensors
        return all(leaf in self.tensors for leaf in self._places.stored_as(home.name, self._places.matrices[home.name]))


def _of_awq(weight: QTensor, home: Home) -> Iterator[tuple[Rows, Levels]]:
    assert weight.zero is not None
    for rows in _panels(home.shape):
        here = slice(rows.start + home.row, rows.stop + home.row)
        zero = weight.zero[here].to(torch.int8).repeat_interleave(AUTOAWQ_GROUP, 1)
        yield rows, Levels(weight.codes[here].to(torch.int8) - zero, weight.scale[here], None, AUTOAWQ_GROUP)


def _floats(record: Record, rows: slice) -> Tensor:
    found = torch.from_numpy(np.array(record.rows(rows.start, rows.stop)))
    return found.view(torch.bfloat16) if record.dtype == "bfloat16" else found


def _panels(shape: Shape) -> Iterator[slice]:
    at_once = max(1, TOGETHER // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], at_once):
        yield slice(start, min(start + at_once, shape[0]))
