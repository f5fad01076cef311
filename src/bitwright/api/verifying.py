"""verify(): is a quantized folder what it claims to be, whoever wrote it?"""

from pathlib import Path

from bitwright.api.beside_original import Beside
from bitwright.api.completeness import require_same_model, settings
from bitwright.api.dequantizing import is_made_dense, load_codes
from bitwright.api.engine_files import engine_format
from bitwright.api.findings import Check, Verification
from bitwright.api.loading import load
from bitwright.api.random_tokens import cannot_run, divergence_from, logits_of, of_chance, random_tokens
from bitwright.api.report_file import digests_of, is_made_of
from bitwright.api.soundness import structure
from bitwright.api.source import open_checkpoint
from bitwright.api.verifying_files import verify_file
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.progress import Listener, silent
from bitwright.formats import QuantizedFolder

LOGITS_APART, WITH_ACTIVATIONS = 0.01, 0.5
"""How far logits of two decoders of the same codes may lie apart, root mean square over standard deviation: in float32,
and where activations are quantized, which may round the other way."""


def verify(
    folder: Path | str, against: Path | str | None = None, *, logits: bool = True, listener: Listener = silent
) -> Verification:
    """Looks at every quantized linear of a folder, at what it takes on disk, and, with ``logits``, at what the folder
    computes when transformers loads it, beside our own decoding of its codes; or at an engine's own file (gguf, mlc).

    Of an architecture that transformers does not know, nothing can be computed, and the check says so.

    ``against`` is the original: its tensors must all be there, quantized or as they were, and how far weights and
    logits are from it is measured; where its weights tell nothing and logits are left out, the check of weights is not
    passed. A file's may also be the quantized folder that it was made of. Raises
    CheckpointError for a folder or a file that cannot be read at all, and for an original of another model.
    """
    if (format := engine_format(Path(folder))) is not None:
        return verify_file(format, Path(folder), None if against is None else Path(against), logits, listener)
    model = QuantizedFolder.open(Path(folder))
    if model.format is None:
        raise CheckpointError(f"{folder} is not quantized: its config.json has no quantization_config")
    original = None if against is None else open_checkpoint(Path(against))
    if original is not None:
        require_same_model(model, original)
    checks, bits = structure(model, None if original is None else original.shapes, listener)
    divergence = beside = None
    if original is not None:
        beside = Beside(model, original)
        beside.look(listener)
        checks.append(settings(model, original))
        decided = bool(digests_of(model.folder))
        checks.append(beside.check(decided, sure=logits or (decided and is_made_of(model.folder, original))))
    if not isinstance(kind := model.config.get("model_type"), str):
        checks.append(Check("logits", False, f"config.json says model_type {kind!r}: no program can load this"))
    elif logits and (why := cannot_run(model.config)) is not None:
        checks.append(Check("logits", True, f"not run: {why}"))
    elif logits and all(check.passed for check in checks):
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
        largest_error=None if beside is None or beside.worst is None else beside.linears[beside.worst],
        largest_in=None if beside is None else beside.worst,
        mean_error=None if beside is None else beside.mean,
    )


def _logits(model: QuantizedFolder, original: Path | None, listener: Listener) -> tuple[list[Check], float | None]:
    """What the folder computes on random tokens, beside our own decoding, and beside the original."""
    tokens = random_tokens(model.folder)
    checks, divergence = list[Check](), None
    ours = logits_of(lambda: load_codes(model), tokens, listener, "our decoding")
    try:
        theirs = logits_of(
            lambda: load(model.folder, device="cpu", dtype="float32"), tokens, listener, "as it is loaded"
        )
    except UserError as error:
        return [Check("loads", False, str(error))], None
    apart = float((theirs - ours).square().mean().sqrt() / ours.std())
    allowed = WITH_ACTIVATIONS if model.described and model.described.activations else LOGITS_APART
    said = f"as loaded and as we decode the codes: {apart:.2g} standard deviations apart (at most {allowed})"
    if is_made_dense(model.checkpoint):
        said = "finite; our own decoding alone was run, transformers leaves this format to gptqmodel"
    checks.append(Check("logits", apart <= allowed, said))
    if original is not None:
        reference = logits_of(lambda: load(original, device="cpu", dtype="float32"), tokens, listener, "the original")
        divergence = divergence_from(reference, theirs)
        apart_from = f"KL {divergence:.4f} nats per token on random tokens"
        checks.append(Check("against the original", divergence < of_chance(reference), apart_from))
    return checks, divergence
