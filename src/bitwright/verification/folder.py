"""``verify`` for a quantized folder, whoever wrote it."""

from pathlib import Path

from torch import Tensor

from bitwright.checkpoint.account_file import is_made_of, read_account
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.progress import Listener
from bitwright.evaluation.loading import load, load_codes
from bitwright.formats import CONFIG, QuantizedFolder, is_made_dense
from bitwright.model.buildable import is_at_odds, misnamed
from bitwright.model.config import code_from_elsewhere
from bitwright.model.float8 import is_float8
from bitwright.model.quantized_original import as_dense
from bitwright.model.source import open_checkpoint
from bitwright.verification.beside_original import Beside
from bitwright.verification.completeness import is_another, require_same_model, settings
from bitwright.verification.findings import Check, Verification
from bitwright.verification.random_tokens import cannot_run, divergence_from, logits_of, of_chance, random_tokens
from bitwright.verification.soundness import structure

LOGITS_APART, WITH_ACTIVATIONS = 0.01, 0.5
"""How far logits of two decoders of the same codes may lie apart, root mean square over standard deviation.

The first is for float32, the second for quantized activations, which may round the other way.
"""


def verify_folder(folder: Path, against: Path | None, logits: bool, listener: Listener) -> Verification:
    """Check a quantized folder; see ``bitwright.verify``."""
    model = QuantizedFolder.open(folder)
    if model.format is None:
        raise CheckpointError(f"{folder} is not quantized: its config.json has no quantization_config")
    original = None if against is None else _original(against, model)
    if original is not None:
        require_same_model(model, original)
    checks, bits = structure(model, None if original is None else original.shapes, listener)
    divergence = beside = None
    if original is not None:
        beside = Beside(model, original)
        beside.look(listener)
        checks.append(settings(model, original))
        account = read_account(model.folder)
        decided = account is not None and bool(account.digests)
        of_this = is_made_of(account, original)
        another = not of_this and is_another(model, original)
        checks.append(beside.check(decided, sure=logits or (decided and of_this), another=another))
    if (wrong := misnamed(model.config)) is not None:
        checks.append(Check("logits", False, f"config.json says {wrong}: no program can load this"))
    elif logits and (why := cannot_run(model.config)) is not None:
        checks.append(Check("logits", None, f"not run: {why}", matters=is_at_odds(model.config)))
    elif logits and not any(check.passed is False for check in checks):
        logits_checks, divergence = _logits(model, None if original is None else original.folder, listener)
        checks += logits_checks
    if (code := code_from_elsewhere(model.config)) is not None:
        asked = f"not looked at: config.json asks for {code}, which takes a package of its own; all was done without it"
        checks.append(Check("attention", None, asked, matters=False))
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


def _original(against: Path, model: QuantizedFolder) -> Checkpoint:
    """Open the original, dequantized if its weights are FP8, or if the folder was made of these very codes."""
    checkpoint = open_checkpoint(against)
    dense = is_float8(checkpoint.config.get(CONFIG)) or is_made_of(read_account(model.folder), checkpoint)
    return as_dense(checkpoint) if dense else checkpoint


def _why_alone(model: QuantizedFolder) -> str:
    """Why transformers by itself is not asked."""
    config = model.checkpoint.config.get(CONFIG)
    wrong = model.format.wrongly_loaded(config) if model.format is not None and isinstance(config, dict) else None
    return wrong or "transformers by itself does not load this format"


def _apart(theirs: Tensor, ours: Tensor) -> float:
    """How far logits lie apart: root mean square, over the standard deviation of ours."""
    return float((theirs - ours).square().mean().sqrt() / ours.std())


def _logits(model: QuantizedFolder, original: Path | None, listener: Listener) -> tuple[list[Check], float | None]:
    """Compare the folder's logits on random tokens with those of our own decoding, and with the original's."""
    tokens = random_tokens(model.folder)
    checks, divergence = list[Check](), None
    ours = logits_of(lambda: load_codes(model), tokens, listener, "our decoding")
    try:
        theirs = logits_of(
            lambda: load(model.folder, device="cpu", dtype="float32"), tokens, listener, "as it is loaded"
        )
    except UserError as error:
        return [Check("loads", False, str(error))], None
    apart, how = _apart(theirs, ours), ""
    allowed = WITH_ACTIVATIONS if model.described and model.described.activations else LOGITS_APART
    if apart > allowed:  # weights rounded in another place may send a token to another expert
        rounded = logits_of(lambda: load_codes(model, rounded=True), tokens, listener, "our decoding, rounded")
        apart, how = _apart(theirs, rounded), ", rounded to the dtype of the scales"
    summary = f"as loaded and as we decode the codes{how}: {apart:.2g} standard deviations apart (at most {allowed})"
    if is_made_dense(model.checkpoint):
        summary = f"finite; our own decoding alone was run: {_why_alone(model)}"
    checks.append(Check("logits", apart <= allowed, summary))
    if original is not None:
        reference = logits_of(lambda: load(original, device="cpu", dtype="float32"), tokens, listener, "the original")
        divergence = divergence_from(reference, theirs)
        apart_from = f"KL {divergence:.4f} nats per token on random tokens"
        checks.append(Check("against the original", divergence < of_chance(reference), apart_from))
    return checks, divergence
