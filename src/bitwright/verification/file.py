"""``verify`` for an engine's own file: alone, or beside a folder, its weights decoded and compared one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.core.decoder import EMBEDDING, HEAD
from bitwright.core.engine_file import EngineFile
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.format import FileFormat
from bitwright.core.progress import Listener, Progress
from bitwright.evaluation.loading import load, load_codes, load_model
from bitwright.formats import QuantizedFolder
from bitwright.stream.memory import peak_memory
from bitwright.verification.engine_files import (
    bits_per_weight,
    error_of,
    file_structure,
    linears_of,
    not_compared,
    not_there,
    settings,
)
from bitwright.verification.findings import MOVED, SCALES_MOVED, Check, Verification, first, lacking, undecided
from bitwright.verification.random_tokens import divergence_from, logits_of, of_chance, random_tokens

FROM_QUANTIZED, FROM_ORIGINAL = 0.5, 1.0
"""The relative squared error that a tensor must stay below, beside a quantized folder and beside the original.

The codes of a quantized folder were kept, or quantized once more (an embedding in two bits). 2 is the error of another
weight altogether.
"""


def verify_file(format: FileFormat, path: Path, against: Path | None, logits: bool, listener: Listener) -> Verification:
    """Check an engine's file; see ``bitwright.verify``.

    Beside a folder its weights are compared with the folder's, and, with ``logits``, its logits, which transformers
    computes with the folder's config. Raises CheckpointError for a file that cannot be read.
    """
    file = format.open(path)
    checks = [*file_structure(file, listener, alone=against is None), *settings(file)]
    if (sums := file.checksums()) is not None:
        checks.append(_checksums(*sums, matters=against is None))
    beside, divergence = _Beside(), None
    if against is not None:
        model = QuantizedFolder.open(against)
        checks += beside.look(file, model, logits, listener)
        if logits and not any(check.passed is False for check in checks):
            check, divergence = _logits(file, model, listener)
            checks.append(check)
    worst = max(beside.errors, key=beside.errors.__getitem__, default=None)
    checks += not_compared(file, alone=against is None)
    return Verification(
        folder=str(path),
        format=format.name,
        against=None if against is None else str(against),
        linears=len(linears_of(file)),
        bits_per_weight=bits_per_weight(file),
        kl_divergence=divergence,
        checks=tuple(checks),
        largest_error=None if worst is None else beside.errors[worst],
        largest_in=worst,
        mean_error=sum(beside.errors.values()) / len(beside.errors) if beside.errors else None,
    )


def _checksums(damaged: Sequence[str], without: Sequence[str], matters: bool) -> Check:
    """Check the shards' checksums, which matter if nothing else tells whether the codes are those that were written."""
    if damaged or not without:
        return Check("checksums", not damaged, first(damaged) or "every shard as its checksum says")
    unstated = first([f"the index has no checksum of {name}" for name in without])
    return Check("checksums", None, f"not looked at: {unstated}", matters)


@dataclass
class _Beside:
    """A file beside a folder: relative squared errors by the folder's names."""

    errors: dict[str, float] = field(default_factory=dict)

    def look(self, file: EngineFile, model: QuantizedFolder, logits: bool, listener: Listener) -> list[Check]:
        """Compare settings, names and weights; ``logits``: whether logits are compared afterwards.

        Raises CheckpointError if the file's weights cannot be told apart.
        """
        if not file.names:
            raise CheckpointError(f"{file.path}: cannot be compared with {model.folder}: {file.unknown}")
        unlike = file.unlike(model.config)
        checks = [Check("settings", not unlike, first(unlike) or "those of the folder's config.json")]
        missing = not_there(file, model)
        checks.append(Check("all of the folder", not missing, lacking(missing) or "all tensors of the folder"))
        if missing:
            return checks
        for done, name in enumerate(file.names):
            listener(Progress("verify", done, len(file.names), name, peak_memory(), detail="beside the folder"))
            if (before := _in(model, name)) is not None:
                self.errors[name] = error_of(file, name, before.__getitem__)
        return [*checks, self._weights(file, model, logits)]

    def _weights(self, file: EngineFile, model: QuantizedFolder, logits: bool) -> Check:
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        most = f"relative error at most {self.errors[worst]:.3g} (in {worst})"
        summary = f"{len(self.errors)} tensors, {most}, {mean:.3g} on average"
        allowed = FROM_QUANTIZED if model.format is not None else FROM_ORIGINAL
        vectors = (error for name, error in self.errors.items() if len(file.shape(name)) == 1)
        if model.format is None and max(vectors, default=0.0) > MOVED:
            if not logits:
                return undecided(summary)
            summary, allowed = f"{summary}; {SCALES_MOVED}, logits alone tell", float("inf")
        return Check("weights", self.errors[worst] < allowed, summary)


def _in(model: QuantizedFolder, name: str) -> Tensor | None:
    """A tensor of a folder, dequantized to float32 if it is quantized; None if the folder does not have it."""
    linear = name.removesuffix(".weight")
    if linear in model.linears:
        return model.read(linear).dequantize(torch.float32)
    if name not in model.passed and linear == HEAD and model.config.get("tie_word_embeddings"):
        name = f"{EMBEDDING}.weight"  # an output layer that was quantized as a copy of the embedding
    return model.tensor(name) if name in model.passed else None


def _logits(file: EngineFile, model: QuantizedFolder, listener: Listener) -> tuple[Check, float | None]:
    """Compare the logits of the file's weights, in transformers' model of the folder's config, with the folder's."""
    tokens, name = random_tokens(model.folder), "against the folder" if model.format else "against the original"
    try:
        ours = logits_of(lambda: _loaded(file, model), tokens, listener, "the file's weights")
        reference = logits_of(lambda: _reference(model), tokens, listener, "the folder")
    except UserError as error:
        return Check(name, False, str(error)), None
    divergence = divergence_from(reference, ours)
    summary = f"KL {divergence:.4f} nats per token on random tokens"
    return Check(name, divergence < of_chance(reference), summary), divergence


def _loaded(file: EngineFile, model: QuantizedFolder) -> PreTrainedModel:
    tensors = {name: _whole(file, name) for name in file.names}
    return load_model(model.folder, torch.float32, torch.device("cpu"), tensors)


def _reference(model: QuantizedFolder) -> PreTrainedModel:
    return load(model.folder, device="cpu", dtype="float32") if model.format is None else load_codes(model)


def _whole(file: EngineFile, name: str) -> Tensor:
    tensor = torch.empty(file.shape(name))
    for rows, values in file.values(name):
        tensor[rows] = values
    return tensor
