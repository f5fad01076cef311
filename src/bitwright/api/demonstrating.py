"""demo(): quantize the embedded model at 4, 3 and 2 bits, and measure each written folder beside the original."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch
from transformers import AutoTokenizer

from bitwright.api.evaluating import evaluate
from bitwright.api.inspecting import inspect
from bitwright.api.quantizing import quantize
from bitwright.core.progress import Listener, silent
from bitwright.core.recipe import Recipe
from bitwright.demo import MODEL_DIR
from bitwright.evaluation.loading import load
from bitwright.prepare.resources import refuse_output

SCHEMES = ("W4A16g128", "W3A16g128", "W2A16g128")
PROMPT = 'def read_file(path):\n    """Read'
SEQLEN, WINDOWS, NEW_TOKENS = 512, 24, 48


@dataclass(frozen=True)
class DemoRow:
    """One model of the demonstration.

    ``bits_per_weight`` counts the linears with scales and zeros, ``model_bits_per_weight`` all that is stored;
    ``seconds`` is the time that quantizing took.
    """

    method: str
    scheme: str
    bits_per_weight: float
    model_bits_per_weight: float
    weight_bytes: int
    perplexity: float
    kl_divergence: float
    seconds: float | None
    completion: str


@dataclass(frozen=True)
class Demonstration:
    """The rows of the demonstration, and the prompt that every model completes.

    Perplexity and divergence are measured over ``windows`` windows of ``seqlen`` tokens.
    """

    prompt: str
    windows: int
    seqlen: int
    rows: tuple[DemoRow, ...]


def demo(output: Path | str | None = None, *, listener: Listener = silent) -> Demonstration:
    """Quantize and measure the embedded model; the folders are kept in ``output``, if it is named."""
    with TemporaryDirectory(prefix="bitwright-demo-") as temporary:
        folder = Path(output or temporary)
        for scheme in SCHEMES:
            refuse_output(MODEL_DIR, folder / scheme, overwrite=False)
        rows = [_row("none", "16 bit", MODEL_DIR, None, listener)]
        for scheme in SCHEMES:
            recipe = Recipe(model=str(MODEL_DIR), scheme=scheme, method="rtn")
            start = monotonic()
            quantize(recipe, folder / scheme, restart=True, listener=listener)
            rows.append(_row("rtn", scheme, folder / scheme, monotonic() - start, listener))
    return Demonstration(PROMPT, WINDOWS, SEQLEN, tuple(rows))


def _row(method: str, scheme: str, folder: Path, seconds: float | None, listener: Listener) -> DemoRow:
    reference = None if folder == MODEL_DIR else MODEL_DIR
    numbers = evaluate(folder, "builtin", seqlen=SEQLEN, windows=WINDOWS, reference=reference, listener=listener)
    measured = numbers.measurement
    assert measured is not None, "a text was asked for"
    inspected = inspect(folder)
    return DemoRow(
        method=method,
        scheme=scheme,
        bits_per_weight=inspected.bits_per_weight,
        model_bits_per_weight=inspected.model_bits_per_weight,
        weight_bytes=numbers.weight_bytes,
        perplexity=measured.perplexity,
        kl_divergence=measured.kl_divergence or 0.0,
        seconds=seconds,
        completion=complete(folder, PROMPT),
    )


def complete(folder: Path, prompt: str) -> str:
    """Complete a prompt with a model, greedily."""
    model = load(folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(  # type: ignore[operator]  # transformers types it as a tensor
            ids, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
