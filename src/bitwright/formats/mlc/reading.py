"""A folder of MLC-LLM that anybody wrote, read and decoded: a ``core.engine_file.EngineFile``."""

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
from bitwright.core.json_shape import TEXT, Items, Keys, require_shape
from bitwright.core.panels import row_panels
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.small_files import parse_object, read_small
from bitwright.formats import awq
from bitwright.formats.mlc import architectures
from bitwright.formats.mlc.cache import Cache, Record, read_cache
from bitwright.formats.mlc.chat import CONFIG
from bitwright.formats.mlc.places import Home, Places, is_inside
from bitwright.formats.mlc.possible import impossible
from bitwright.formats.mlc.presets import AUTOAWQ, unpacked

TIED = "tie_word_embeddings"
CHOSEN = ("context_window_size", "prefill_chunk_size", "max_batch_size", "sliding_window_size", "attention_sink_size")
"""Settings of how the model is run, which may differ from config.json."""
_CONFIG = Keys({"model_type": TEXT, "quantization": TEXT, "model_config": Keys(), "tokenizer_files": Items(TEXT)})


def opened(path: Path) -> "MlcFolder":
    """Open a folder of MLC-LLM. Raises CheckpointError for one that is incomplete or damaged."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: has no {CONFIG}; copy the whole folder, or write it again")
    config = parse_object(read_small(path / CONFIG), str(path / CONFIG))
    require_shape(config, _CONFIG, str(path / CONFIG), "copy the folder again")
    cache, settings = read_cache(path), config.get("model_config")
    if not cache.records:
        raise CheckpointError(f"{path}: has no tensor at all; copy the folder again")
    blocks = settings.get("num_hidden_layers", 0) if isinstance(settings, dict) else None
    if not isinstance(blocks, int) or blocks > len(cache.records):
        raise CheckpointError(
            f"{path / CONFIG}: says there are {blocks} blocks, in {len(cache.records)} tensors; copy the folder again"
        )
    return MlcFolder(path, config, cache)


@dataclass(frozen=True)
class MlcFolder:
    """A folder whose config and index have been read."""

    path: Path
    config: Mapping[str, Any]
    cache: Cache

    @cached_property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """The tensors in the folder."""
        records = self.cache.records.items()
        return {name: EngineTensor(name, record.shape, record.dtype, record.nbytes) for name, record in records}

    @property
    def unknown(self) -> str:
        """The reason why the architecture is not looked at; "" if it is."""
        return self._places.unknown

    @cached_property
    def wanted(self) -> Wanted | None:
        """The tensors that the architecture needs."""
        return None if self.unknown else Wanted(self._places.needed())

    @cached_property
    def names(self) -> Sequence[str]:
        """The original's tensors that are in the folder."""
        return tuple(name for name, home in self._places.homes.items() if self._is_there(home))

    @property
    def misfiled(self) -> str | None:
        """The fault of a shard that the index does not name, or of a tokenizer's file that is missing.

        Other shards were checked when the index was read.
        """
        named = {record.shard.name for record in self.cache.records.values()}
        more = sorted(path.name for path in self.path.glob("params_shard_*.bin") if path.name not in named)
        if more:
            return f"{more[0]} is not in the index"
        missing = [name for name in self.config.get("tokenizer_files") or () if not (self.path / str(name)).is_file()]
        return f"{missing[0]} is missing, which {CONFIG} names" if missing else None

    def impossible(self) -> list[str]:
        """The settings that MLC-LLM cannot compute with, in words."""
        return impossible(self.config, self.config.get("model_type") in architectures.ARCHITECTURES)

    @property
    def unread(self) -> str:
        """The tokenizer's files and the conversation's texts, which are not looked at."""
        return "what is in the tokenizer's files and the texts of conv_template"

    def numbers(self, name: str) -> str | None:
        """The fault of scales, or of values that are stored as they are: not finite, or scales that are all zero."""
        record = self.cache.records[name]
        if record.dtype not in ("float16", "float32", "bfloat16"):
            return None
        any_scale = False
        for rows in row_panels(record.shape):
            numbers = _floats(record, rows)
            if not bool(numbers.isfinite().all()):
                return "NaN or infinite"
            any_scale = any_scale or bool(numbers.any())
        return "all its scales are zero" if name.endswith((".q_scale", ".scales")) and not any_scale else None

    def is_read(self, name: str) -> bool:
        """Whether the meaning of the numbers is known."""
        return not self.unknown or self.cache.records[name].dtype.startswith(("float", "bfloat"))

    def checksums(self) -> tuple[list[str], list[str]]:
        """The shards that differ from their checksums, and those that have none."""
        return self.cache.changed(), sorted(self.cache.shards - {path.name for path in self.cache.digests})

    def bits(self) -> tuple[int, int]:
        """The bits stored for the matrices in the model's blocks, and the number of their weights."""
        inside = {name: shape for name, shape in self._places.matrices.items() if is_inside(name)}
        stored = (leaf for name, shape in inside.items() for leaf in self._places.stored_as(name, shape))
        nbytes = sum(self.tensors[leaf].nbytes for leaf in stored if leaf in self.tensors)
        return 8 * nbytes, sum(rows * columns for rows, columns in inside.values())

    def unlike(self, config: Mapping[str, Any]) -> list[str]:
        """The settings that differ from a config.json. Raises RecipeError for an architecture that MLC does not run."""
        decoder = architectures.checked(config)
        if decoder.model_type != self.config.get("model_type"):
            return [f"model_type is {self.config.get('model_type')}, the folder's {decoder.model_type}"]
        theirs, wrong = self.config.get("model_config") or {}, []
        for key, value in architectures.model_config(decoder).items():
            stated = theirs.get(key)
            if key in CHOSEN or not isinstance(stated, int | float) or not isinstance(value, int | float):
                continue
            if key == TIED and value and not stated:
                continue  # --quantize-lm-head gives the output layer a weight of its own, which has to be there then
            if abs(stated - value) > 1e-6 * abs(value):
                wrong.append(f"{key} is {stated:g}, the folder's {value:g}")
        return wrong

    def shape(self, name: str) -> Shape:
        """The shape of a tensor of the original."""
        return self._places.homes[name].shape

    def values(self, name: str) -> Iterator[tuple[Rows, Tensor]]:
        """A tensor in float32, computed from float16 scales."""
        home = self._places.homes[name]
        plain = home.name if len(home.shape) == 1 else f"{home.name}.weight"
        if plain in self.cache.records:
            for part in row_panels(home.shape):
                yield part, _floats(self.cache.records[plain], _below(home, part)).float()
            return
        for rows, stored in self.levels(name):
            step = stored.step.float().repeat_interleave(stored.group, 1)[:, : home.shape[1]]
            yield rows, stored.levels.float() * step

    def levels(self, name: str) -> Iterator[tuple[Rows, Levels]]:
        """The levels of a tensor in the codes of a preset."""
        home, preset = self._places.homes[name], self._places.preset
        if preset is None or not self._is_there(home) or f"{home.name}.weight" in self.tensors:
            return
        if preset.is_awq:
            yield from _of_awq(self._awq(home.name), home)
            return
        words, scales = (self.cache.records[leaf] for leaf in self._stored(home))
        for rows in row_panels(home.shape):
            here = _below(home, rows)
            packed = torch.from_numpy(np.array(words.rows(here)).view(np.int32))
            step = torch.from_numpy(np.array(scales.rows(here)))
            yield rows, Levels(unpacked(packed, preset, home.shape[1]), step, None, preset.group)

    def _awq(self, name: str) -> QTensor:
        leaves = (f"{name}.{leaf}" for leaf in awq.LEAVES)
        tensors = {leaf: torch.from_numpy(np.array(self.cache.records[leaf].rows())) for leaf in leaves}
        words = {leaf: t if t.is_floating_point() else t.view(torch.int32) for leaf, t in tensors.items()}
        return awq.read(words, name, Described(AUTOAWQ.scheme.weight))

    @cached_property
    def _places(self) -> Places:
        return Places(self.config)

    def _is_there(self, home: Home) -> bool:
        return all(leaf in self.tensors for leaf in self._stored(home))

    def _stored(self, home: Home) -> list[str]:
        """The names of the tensors that a vector, or the matrix around a tensor, is stored as."""
        if len(home.shape) == 1:
            return [home.name]
        return list(self._places.stored_as(home.name, self._places.matrices[home.name]))


def _below(home: Home, rows: slice) -> slice:
    """Rows of a tensor as rows of the matrix that it lies in."""
    return slice(rows.start + home.row, rows.stop + home.row)


def _of_awq(weight: QTensor, home: Home) -> Iterator[tuple[Rows, Levels]]:
    assert weight.zero is not None
    for rows in row_panels(home.shape):
        here = _below(home, rows)
        zero = weight.zero[here].to(torch.int8).repeat_interleave(AUTOAWQ.group, 1)
        yield rows, Levels(weight.codes[here].to(torch.int8) - zero, weight.scale[here], None, AUTOAWQ.group)


def _floats(record: Record, rows: slice) -> Tensor:
    values = torch.from_numpy(np.array(record.rows(rows)))
    return values.view(torch.bfloat16) if record.dtype == "bfloat16" else values
