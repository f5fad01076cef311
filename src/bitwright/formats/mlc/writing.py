"""A model written as a folder of MLC-LLM, matrix by matrix of MLC's model."""

from pathlib import Path

import torch
from torch import Tensor

from bitwright.checkpoint.writer import copy_file, write_json
from bitwright.core.convert import difference, require_finite
from bitwright.core.decoder import EMBEDDING, HEAD
from bitwright.core.errors import CheckpointError
from bitwright.core.format import QuantizedModel, WriteOptions, typical
from bitwright.core.progress import Listener, Progress
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Difference
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats.mlc import architectures, chat
from bitwright.formats.mlc.architectures import Place
from bitwright.formats.mlc.beforehand import cannot_hold, no_place, no_tensor, nothing_quantized, preset_for
from bitwright.formats.mlc.presets import fitted_to, lost, placed, rounded
from bitwright.formats.mlc.shards import Shards

LOST = 1e-4
"""The relative squared error of a tensor in float16 above which its numbers are lost, not rounded."""


def write(model: QuantizedModel, output: Path, options: WriteOptions, listener: Listener) -> list[Difference]:
    """Write the folder ``output``, which is there and empty; return what linears, embedding and output layer lost.

    Raises RecipeError for a weight that no preset holds, unless ``lossy``: then it is quantized once more.
    """
    if not model.linears:
        raise nothing_quantized(model.folder)
    writing = _Writing(model, options, Shards(output))
    writing.run(listener)
    settings = chat.chat_config(model.config, writing.decoder, model.folder, writing.preset.name, options.base)
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
        first = model.read(name := typical(model))
        require_finite(name, first)
        self.preset = preset_for(self.decoder, first.grid, first.tile, options)
        if not options.lossy and placed(first, self.preset) is None:  # refused now, because the embedding takes long
            raise cannot_hold(f"{name} cannot be held exactly", self.preset.name, options.lossy)

    def run(self, listener: Listener) -> None:
        """Write every tensor of MLC's model. Raises CheckpointError for a tensor that it has no place for."""
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
        if HEAD in self.linears and self.preset.embeddings:
            self._matrix(Place(HEAD, (HEAD,)))
        elif HEAD in self.linears:
            self.pending -= {HEAD}
            self._outside(HEAD, self.model.read(HEAD).dequantize(torch.float32), fresh=False)
        else:
            source = EMBEDDING if tied else HEAD
            self.pending.add(f"{source}.weight")
            self._outside(HEAD, self._taken(f"{source}.weight"))

    def _outside(self, name: str, weight: Tensor, fresh: bool = True) -> None:
        """Write embedding or output layer: in the preset's codes of least squared error, or as it is."""
        if not self.preset.embeddings:
            error = self._plain(f"{name}.weight", weight)
            if not fresh:  # had codes, and has none here
                self.differences.append(Difference(name, False, error))
            return
        quantized = fitted_to(weight, self.preset)
        self.differences.append(lost(name, weight, quantized, fresh))
        self._add(name, quantized)

    def _matrix(self, place: Place) -> None:
        """Write a matrix of linears that lie below one another, and its bias."""
        matrix = QTensor.of_rows([self._linear(name) for name in place.linears])
        if not matrix.scale.all():
            raise _too_small(f"{place.name}: scales")
        self._add(place.name, matrix)
        if place.bias:
            self._plain(f"{place.name}.bias", torch.cat([self._taken(f"{name}.bias") for name in place.linears]))

    def _linear(self, name: str) -> QTensor:
        """A linear in the preset's codes."""
        if name not in self.linears:
            return self._again(name, self._taken(f"{name}.weight"), "is not quantized", fresh=True)
        self.pending -= {name}
        weight = self.model.read(name)
        require_finite(name, weight)
        kept = placed(weight, self.preset)
        if kept is None or not kept.scale.isfinite().all():
            return self._again(name, weight.dequantize(torch.float32), "cannot be held exactly")
        self.differences.append(difference(name, weight, kept))
        return kept

    def _again(self, name: str, weight: Tensor, why: str, fresh: bool = False) -> QTensor:
        """A linear quantized anew. Raises RecipeError, with the reason ``why``, unless that was asked for."""
        columns, group = weight.shape[1], self.preset.group
        divides = self.preset.divides(columns)
        if not (divides and self.options.lossy):
            also = "" if divides else f", and {columns} input features do not divide into groups of {group},"
            raise cannot_hold(f"{name} {why}{also}", self.preset.name, self.options.lossy)
        quantized = fitted_to(weight, self.preset)
        self.differences.append(lost(name, weight, quantized, fresh))
        return quantized

    def _add(self, name: str, weight: QTensor) -> None:
        for leaf, tensor in self.preset.encode(name, weight).items():
            self.shards.add(leaf, tensor)
        self.parameters += weight.codes.numel()

    def _plain(self, name: str, tensor: Tensor) -> float:
        """Write a tensor in float16, and return the relative squared error of that.

        Raises CheckpointError for numbers that float16 does not hold.
        """
        half = tensor.to(torch.float16)
        if not half.isfinite().all():
            raise CheckpointError(f"{name} reaches beyond what float16 holds, in which MLC-LLM computes")
        if (error := rounded(tensor)) > LOST:
            raise _too_small(name)
        self.shards.add(name, half)
        self.parameters += half.numel()
        return error

    def _taken(self, name: str) -> Tensor:
        """Read a tensor, and note that it has a place. Raises CheckpointError if it is not there."""
        if name not in self.pending:
            raise no_tensor(self.model.folder, name)
        self.pending -= {name}
        return self.model.tensor(name)
