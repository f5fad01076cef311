"""verify(): is a quantized folder what it claims to be, whoever wrote it?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.api.dequantizing import is_made_dense, load_codes
from bitwright.api.loading import load
from bitwright.api.soundness import Check, structure
from bitwright.api.source import model_config, open_checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.formats import QuantizedFolder
from bitwright.stream.memory import peak_memory

TOKENS, SEED = 64, 0
LOGITS_APART, WITH_ACTIVATIONS = 0.01, 0.5
"""How far logits of two decoders of the same codes may lie apart, root mean square over standard deviation: in float32,
and where activations are quantized, which may round the other way."""


@dataclass(frozen=True)
class Verification:
    """What is true of a folder. ``kl_divergence`` (nats per token, on random tokens) is None without an original."""

    folder: str
    format: str
    against: str | None
    linears: int
    bits_per_weight: float
    kl_divergence: float | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(
    folder: Path | str, against: Path | str | None = None, *, logits: bool = True, listener: Listener = silent
) -> Verification:
    """Looks at every quantized linear of a folder, at what it takes on disk, and, with ``logits``, at what the folder
    computes when transformers loads it, beside our own decoding of its codes.

    ``against`` is the original: its tensors must all be there, quantized or as they were, and the divergence from it is
    measured. Raises CheckpointError for a folder that cannot be read at all.
    """
    model = QuantizedFolder.open(Path(folder))
    if model.format is None:
        raise CheckpointError(f"{folder} is not quantized: its config.json has no quantization_config")
    original = None if against is None else open_checkpoint(Path(against))
    checks, bits = structure(model, None if original is None else original.names, listener)
    divergence = None
    if logits and all(check.passed for check in checks):
        found, divergence = _logits(model, None if original is None else original.folder, listener)
        checks += found
    return Verification(
        folder=str(folder),
        format=model.format_name,
        against=None if against is None else str(against),
        linears=len(model.linears) + len(model.stacks),
        bits_per_weight=bits,
        kl_divergence=divergence,
        checks=tuple(checks),
    )


def _logits(model: QuantizedFolder, original: Path | None, listener: Listener) -> tuple[list[Check], float | None]:
    """What the folder computes on random tokens, beside our own decoding, and beside the original."""
    vocabulary = int(model_config(model.folder).vocab_size)
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))
    checks, divergence = list[Check](), None
    ours = _of(lambda: load_codes(model), tokens, listener, "our decoding")
    try:
        theirs = _of(lambda: load(model.folder, device="cpu", dtype="float32"), tokens, listener, "as it is loaded")
    except UserError as error:
        return [Check("loads", False, str(error))], None
    apart = float((theirs - ours).square().mean().sqrt() / ours.std())
    allowed = WITH_ACTIVATIONS if model.described and model.described.activations else LOGITS_APART
    said = f"as loaded and as we decode the codes: {apart:.2g} standard deviations apart (at most {allowed})"
    if is_made_dense(model.checkpoint):
        said = "finite; our own decoding alone was run, transformers leaves this format to gptqmodel"
    checks.append(Check("logits", apart <= allowed, said))
    if original is not None:
        reference = _of(lambda: load(original, device="cpu", dtype="float32"), tokens, listener, "the original")
        log_p, log_q = reference.log_softmax(-1), theirs.log_softmax(-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        apart_from = f"KL {divergence:.4f} nats per token on random tokens"
        checks.append(Check("against the original", divergence < _of_chance(reference), apart_from))
    return checks, divergence


def _of_chance(logits: Float[Tensor, "T V"]) -> float:
    """KL of a model that knows nothing, all tokens alike, from one with these logits."""
    log_p = logits.log_softmax(-1)
    return float((log_p.exp() * log_p).sum(-1).mean()) + torch.tensor(float(logits.shape[-1])).log().item()


@torch.inference_mode()
def _of(
    make: Callable[[], PreTrainedModel], tokens: Int[Tensor, "1 T"], listener: Listener, what: str
) -> Float[Tensor, "T V"]:
    listener(Progress("verify", 0, 1, "logits", peak_memory(), detail=what))
    model = make()
    found: Tensor = model(tokens, use_cache=False).logits[0].float()
    return found
