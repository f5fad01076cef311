"""MLC-LLM's own folders: weights in its grids, and what its engine has to know (docs/formats/mlc.md).

``tensor-cache.json`` and ``params_shard_N.bin`` (``shards.py``), ``mlc-chat-config.json`` (``chat.py``), the
tokenizer's files. Which grids there are stands in ``presets.py``, what tensors are called in ``architectures.py``. A
phone needs a library beside it that MLC compiles for the same architecture and preset.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.checkpoint.writer import copy_file, write_json
from bitwright.core.convert import difference, require_finite
from bitwright.core.decoder import EMBEDDING, HEAD
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.format import FileFormat, Foreseen, QuantizedModel, WriteOptions, typical
from bitwright.core.grid import Grid, Tile
from bitwright.core.progress import Listener, Progress
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.core.scheme import Scheme
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats import awq
from bitwright.formats.mlc import architectures, chat
from bitwright.formats.mlc.architectures import Place
from bitwright.formats.mlc.beforehand import (
    FLOAT16,
    HOLDS,
    Chosen,
    cannot_hold,
    check_weights,
    no_place,
    no_tensor,
    nothing_quantized,
    preset_of,
)
from bitwright.formats.mlc.cache import INDICES
from bitwright.formats.mlc.presets import (
    AUTOAWQ_GROUP,
    PRESETS,
    as_autoawq,
    fitted_to,
    fitted_to_autoawq,
    is_autoawq,
    joined,
    lost,
    packed,
    placed,
    rounded,
)
from bitwright.formats.mlc.reading import opened
from bitwright.formats.mlc.shards import Shards

SCALES: torch.dtype | None = torch.float16
"""The dtype of scales."""
LOST = 1e-4
"""The relative squared error of a tensor in float16 above which its numbers are lost, not rounded."""
MARKS = (chat.CONFIG, *INDICES)
"""A folder with one of these is MLC-LLM's."""


def holds(grid: Grid, tile: Tile, outliers: bool) -> bool:
    """Whether the format has a place for a linear with this grid and tile, with or without outliers."""
    return not outliers and (is_autoawq(grid, tile) or any(preset.holds(grid, tile) for preset in PRESETS))


def recognizes(path: Path) -> bool:
    """Whether a folder is MLC-LLM's: it has one of its files, and no config.json."""
    return any((path / mark).is_file() for mark in MARKS) and not (path / "config.json").is_file()


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise RecipeError for a weight that is fused over experts."""
    if len(shape) > 2:
        raise RecipeError("format mlc holds no weight that is fused over experts")


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of a linear's tensors, from its shape [O, I] alone. Raises RecipeError for fused experts."""
    if len(shape) > 2:
        raise RecipeError("format mlc holds no weight that is fused over experts")
    if is_autoawq(scheme.weight, scheme.tile):
        return awq.stored_bytes(shape, replace(scheme, tile=Tile(1, AUTOAWQ_GROUP)), dtype)
    (rows, columns), preset = shape, preset_of(scheme.weight, scheme.tile)
    return rows * (4 * preset.words(columns) + 2 * preset.scheme.tile.counts((rows, columns))[1])


def check(config: Mapping[str, Any], folder: Path, options: WriteOptions, foreseen: Foreseen | None = None) -> None:
    """Refuses before the work what MLC-LLM cannot run, options that make no sense, and weights, where they are
    foreseen, that it has no preset or no place for. Raises UserError."""
    decoder = architectures.checked(config)
    chat.chat_config(config, decoder, folder, "", options.base)
    if options.embeddings not in (None, FLOAT16):
        raise RecipeError(
            f"format mlc has no embeddings in {options.embeddings}: leave it out, they are quantized like the linears, "
            f"or take --embeddings {FLOAT16} with 4 bits (MLC's q4f16_2)"
        )
    if foreseen is not None:
        check_weights(decoder, folder, options, foreseen)


def write(model: QuantizedModel, output: Path, options: WriteOptions, listener: Listener) -> list[Difference]:
    """Writes the folder ``output``, which is there and empty; what each linear lost, and embedding and output layer.

    Raises RecipeError for a weight that no preset holds, unless ``lossy``: then it is quantized once more.
    """
    if not model.linears:
        raise nothing_quantized(model.folder)
    writing = _Writing(model, options, Shards(output))
    writing.run(listener)
    settings = chat.chat_config(model.config, writing.decoder, model.folder, writing.quantization, options.base)
    write_json(output / chat.CONFIG, settings)
    for name in chat.files_of(model.folder):
        copy_file(model.folder / name, output / name)
    return writing.differences


def _too_small(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} too small for float16, in which MLC-LLM computes and which ends at 6e-8; leave the model in a format "
        "whose scales are wider, bitwright or compressed-tensors"
    )


class _Writing:
    """One pass over the model, matrix by matrix of MLC's."""

    def __init__(self, model: QuantizedModel, options: WriteOptions, shards: Shards) -> None:
        self.model, self.options, self.shards = model, options, shards
        self.decoder = architectures.checked(model.config)
        self.linears, self.differences, self.parameters = {*model.linears}, list[Difference](), 0
        self.pending = {*model.linears, *model.passed}
        first = model.read(of_most := typical(model))
        require_finite(of_most, first)
        chosen = Chosen.of(self.decoder, first.grid, first.tile, options)
        self.awq, self.preset, self.quantization = chosen.awq, chosen.preset, chosen.name
        if not (self.awq or options.lossy) and placed(first, self.preset) is None:  # the embedding takes long
            raise cannot_hold(f"{of_most} cannot be held exactly", self.quantization, options.lossy)

    def run(self, listener: Listener) -> None:
        """Every tensor of MLC's model. Raises CheckpointError for a tensor that it has no place for."""
        places, norms = list(architectures.matrices(self.decoder)), architectures.norms(self.decoder)
        self._outside(EMBEDDING, self._taken(f"{EMBEDDING}.weight"))
        for done, place in enumerate(places):
            listener(Progress("write", done, len(places), place.name))
            self._matrix(place)
        for name in norms:
            self._plain(name, self._taken(name))
        self._head()
        left = sorted(name for name in self.pending if not name.endswith(NO_WEIGHTS))
        if left:
            raise no_place(self.model.folder, left[0], self.decoder)
        self.shards.finish(self.parameters)

    def _head(self) -> None:
        tied = self.decoder.tied and HEAD not in self.linears
        if tied:
            self.pending -= {f"{HEAD}.weight"}  # some are stored all the same
        if tied and architectures.shares_embedding(self.decoder):
            return
        if HEAD in self.linears and not self.awq and self.preset.embeddings:
            self._matrix(Place(HEAD, (HEAD,)))
        elif HEAD in self.linears:
            self.pending -= {HEAD}
            self._outside(HEAD, self.model.read(HEAD).dequantize(torch.float32), fresh=False)
        else:
            source = EMBEDDING if tied else HEAD
            self.pending.add(f"{source}.weight")
            self._outside(HEAD, self._taken(f"{source}.weight"))

    def _outside(self, name: str, weight: Tensor, fresh: bool = True) -> None:
        """Embedding or output layer: in the preset's codes of least squared error, or as it is."""
        if self.awq or not self.preset.embeddings:
            error = self._plain(f"{name}.weight", weight)
            if not fresh:  # had codes, and has none here
                self.differences.append(Difference(name, False, error))
            return
        made = fitted_to(weight, self.preset)
        self.differences.append(lost(name, weight, made, fresh))
        self._add(name, made)

    def _matrix(self, place: Place) -> None:
        """A matrix of linears that lie below one another, and its bias."""
        made = joined([self._linear(name) for name in place.linears])
        if not made.scale.all():
            raise _too_small(f"{place.name}: scales")
        if self.awq:
            for leaf, tensor in awq.encode(place.name, made).items():
                self.shards.add(leaf, tensor)
            self.parameters += made.codes.numel()
        else:
            self._add(place.name, made)
        if place.bias:
            self._plain(f"{place.name}.bias", torch.cat([self._taken(f"{name}.bias") for name in place.linears]))

    def _linear(self, name: str) -> QTensor:
        """A linear in the preset's codes."""
        if name not in self.linears:
            return self._again(name, self._taken(f"{name}.weight"), "is not quantized", fresh=True)
        self.pending -= {name}
        weight = self.model.read(name)
        require_finite(name, weight)
        made = as_autoawq(weight) if self.awq else placed(weight, self.preset)
        if made is None or not made.scale.isfinite().all():
            return self._again(name, weight.dequantize(torch.float32), "cannot be held exactly")
        self.differences.append(difference(name, weight, made))
        return made

    def _again(self, name: str, weight: Tensor, why: str, fresh: bool = False) -> QTensor:
        divides = not self.awq or weight.shape[1] % AUTOAWQ_GROUP == 0
        if not (divides and self.options.lossy):
            also = "" if divides else f", and {weight.shape[1]} input features do not divide into groups of 128,"
            raise cannot_hold(f"{name} {why}{also}", self.quantization, self.options.lossy)
        made = fitted_to_autoawq(weight) if self.awq else fitted_to(weight, self.preset)
        self.differences.append(lost(name, weight, made, fresh))
        return made

    def _add(self, name: str, weight: QTensor) -> None:
        self.shards.add(f"{name}.q_weight", packed(weight, self.preset))
        self.shards.add(f"{name}.q_scale", weight.scale)
        self.parameters += weight.codes.numel()

    def _plain(self, name: str, tensor: Tensor) -> float:
        """A tensor in float16; the relative squared error of that. Raises CheckpointError where it cannot be."""
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            raise CheckpointError(f"{name} reaches beyond what float16 holds, in which MLC-LLM computes")
        if (error := rounded(tensor)) > LOST:
            raise _too_small(name)
        self.shards.add(name, half)
        self.parameters += half.numel()
        return error

    def _taken(self, name: str) -> Tensor:
        if name not in self.pending:
            raise no_tensor(self.model.folder, name)
        self.pending -= {name}
        return self.model.tensor(name)


FORMAT = FileFormat(
    name="mlc",
    summary="MLC-LLM",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    scales=SCALES,
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
)
