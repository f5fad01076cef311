"""What can be told of a written folder without running it: everything is there once, shapes fit, scales are numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.api.model_view import ModelView
from bitwright.core.errors import OutputError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.qtensor import QTensor
from bitwright.formats import QuantizedFolder
from bitwright.stream.memory import peak_memory

OVERHEAD, SMALL_LINEARS, HEADERS = 1.02, 1.0, 0.01
"""Of what linears take on disk over their true bits: shapes, group indices; in bits, of small ones; of what files take
beside their tensors."""
HEADS = ("lm_head", "embed_out")
"""Output layers that share the embedding's weight where the config says so."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it is as it should be, and what was found."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """What is true of a folder, or of an engine's file.

    ``kl_divergence`` (nats per token, on random tokens) is None without an original; so are ``largest_error``, the
    tensor that it is in, and ``mean_error``, which are of engines' files alone: ``|W - Wx|^2 / |W|^2`` of every tensor.
    """

    folder: str
    format: str
    against: str | None
    linears: int
    bits_per_weight: float
    kl_divergence: float | None
    checks: tuple[Check, ...]
    largest_error: float | None = None
    largest_in: str | None = None
    mean_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def structure(
    model: QuantizedFolder, expected: Iterable[str] | None = None, listener: Listener = silent
) -> tuple[list[Check], float]:
    """What can be told without running the model, every code being read; and the true bits per weight.

    ``expected`` are the names that all tensors together must have where nothing is quantized.
    """
    looked = _Looked(model)
    for done, name in enumerate(names := (*model.linears, *model.stacks)):
        listener(Progress("verify", done, len(names), name, peak_memory()))
        looked.read(name)
    listener(Progress("verify", len(names), len(names), "all linears", peak_memory()))
    return [_once(model), _complete(model, expected), looked.numbers(), looked.on_disk()], looked.bits_per_weight


def require_sound(folder: Path, expected: Iterable[str]) -> str:
    """Looks at a folder that has just been written: names, shapes, scales, not codes; says what was found, in a line.

    Raises OutputError where a check fails: nobody is to load what is silently broken.
    """
    model = QuantizedFolder.open(folder)
    looked = _Looked(model)
    for name in (*model.linears, *model.stacks):
        looked.glance(name)
    checks = [_complete(model, expected), looked.numbers()]
    if model.format is not None:
        checks.append(_once(model))
    return published_only_if(checks)


def published_only_if(checks: Sequence[Check]) -> str:
    """What was found, in a line. Raises OutputError where a check failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        said = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise OutputError(
            f"what was written is not sound, and is not published: {said}. This is a fault of Bitwright or of the "
            "disk; begin anew with --restart, and report it if it happens again"
        )
    return "; ".join(check.found for check in checks)


class _Looked:
    """At linears one by one: their numbers, and what they take."""

    def __init__(self, model: QuantizedFolder) -> None:
        self.model = model
        self.wrong: list[str] = []
        self.true_bits = self.stored_bits = self.weights = 0

    @property
    def bits_per_weight(self) -> float:
        """What everything that was read needs."""
        return self.true_bits / max(1, self.weights)

    def read(self, name: str) -> None:
        """Reads one linear, or the slices of a stack."""
        parts = self.model.slices(name) if name in self.model.stacks else [self.model.read(name)]
        self.true_bits += sum(part.storage_bits for part in parts)
        self.stored_bits += 8 * sum(self.model.checkpoint.nbytes(tensor) for tensor in self.model.stored(name))
        self.weights += sum(part.codes.numel() for part in parts)
        self.wrong += [f"{name}: {what}" for part in parts for what in _wrong(part)]

    def glance(self, name: str) -> None:
        """Reads what lies beside a linear's codes."""
        checkpoint, (codes, *others) = self.model.checkpoint, self.model.stored(name)
        if not min(self.model.shape(name)) or not checkpoint.nbytes(codes):
            self.wrong.append(f"{name}: is empty")
        for other in others:
            if checkpoint.entry(other).dtype.is_floating_point and not checkpoint.read(other).isfinite().all():
                self.wrong.append(f"{other}: NaN or infinite")

    def numbers(self) -> Check:
        """Shapes fit, scales are finite and not zero."""
        return Check("scales and shapes", not self.wrong, first(self.wrong) or "scales finite, shapes fit")

    def on_disk(self) -> Check:
        """What is on disk for the linears is what they need, and the files hold no more than their tensors."""
        checkpoint = self.model.checkpoint
        files = {checkpoint.file(name) for name in checkpoint.names}
        on_disk, held = sum(path.stat().st_size for path in files), checkpoint.total_bytes
        stored = self.stored_bits / max(1, self.weights)
        said = f"{stored:.3f} bits per weight stored, {self.bits_per_weight:.3f} needed; {on_disk:,} bytes in files"
        fits = stored <= self.bits_per_weight * OVERHEAD + SMALL_LINEARS
        passed = fits and on_disk - held <= HEADERS * held + 2**20 * len(files)
        return Check("size on disk", passed, said if passed else f"{said}, of which tensors are {held:,}")


def _wrong(part: QTensor) -> Iterator[str]:
    if not part.scale.isfinite().all():
        yield "a scale is NaN or infinite"
    elif (part.scale == 0).any():
        yield "a scale is zero"
    if part.outlier_value is not None and not part.outlier_value.isfinite().all():
        yield "an outlier is NaN or infinite"
    if part.outlier_index is not None and part.outlier_index.numel():
        index = part.outlier_index
        if int(index.min()) < 0 or int(index.max()) >= part.codes.numel():
            yield "an outlier lies outside of the weight"


def _once(model: QuantizedFolder) -> Check:
    """No weight is there twice, quantized and in full."""
    linears = (*model.linears, *model.stacks)
    dense, passed = ".weight", set(model.passed)
    twice = [x for x in linears if {x, x + dense} & passed or {x + dense, f"{x}.weight_packed"} <= {*model.stored(x)}]
    found = f"{len(linears)} linears, each once" if linears else "no quantized linear at all"
    if twice:
        found = f"{twice[0]} is quantized, and there in full precision too"
    return Check("no duplicates", bool(linears) and not twice, found)


def _complete(model: QuantizedFolder, expected: Iterable[str] | None) -> Check:
    """Everything that the model needs is there: by these names, else by transformers' view of the config."""
    stacks = {name for stack in model.stacks for name in (stack, f"{stack}.weight")}
    there = {*model.passed, *(f"{linear}.weight" for linear in model.linears), *stacks}
    if expected is not None:
        wanted = set(expected)
        missing = sorted(wanted - there)
        return Check("complete", not missing, lacking(missing) or f"all {len(wanted)} tensors of the original")
    view = ModelView.of(model.checkpoint, there)
    if view is None:
        return Check("complete", True, "not looked at: transformers does not know this architecture; --against tells")
    places = {view.places[tensor] for tensor in there}
    wanted = {f"{linear}.weight" for linear in view.linears if not (view.tied and linear in HEADS)}
    missing = sorted(wanted - places)
    return Check("complete", not missing, lacking(missing) or f"all {len(wanted)} linears of the architecture")


def lacking(missing: Sequence[str]) -> str:
    """In words what is not there, "" for nothing."""
    return f"{missing[0]} is not there, and {len(missing) - 1} others" if missing else ""


def first(texts: Sequence[str]) -> str:
    """The first of several findings, and how many more there are."""
    return f"{texts[0]}, and {len(texts) - 1} others" if len(texts) > 1 else "".join(texts)
