"""Checks of a written folder without running it.

Every tensor is there once, shapes fit, scales are numbers, and what is stored is what was decided.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from bitwright.checkpoint.account_file import ACCOUNT, read_account
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import OutputError
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.qtensor import QTensor
from bitwright.core.registry import architecture_of
from bitwright.core.scheme import Scheme
from bitwright.formats import CONFIG, QuantizedFolder
from bitwright.model.plain_config import plain_decoder
from bitwright.stream.memory import peak_memory
from bitwright.verification.as_written import edited
from bitwright.verification.completeness import Shapes, complete, twice
from bitwright.verification.findings import Check, first

OVERHEAD, SMALL_LINEARS, HEADERS = 1.02, 1.0, 0.01
"""Limits of what is stored beside codes and scales.

The ratio of a linear's bits on disk (shapes, group indices) to those it needs; bits per weight more for small linears;
and what files take beside their tensors, as a fraction of them.
"""
WHOLE_BYTES, SAMPLES = 16 * 2**20, 16
"""A tensor that is not quantized and has more bytes is read at so many places, if the check is to be short."""
SMALL, MOST_BYTES = 100_000_000, 4
"""The number of parameters up to which a model is run before it is published (200 MB at 16 bits), and bytes of one."""
EXTRAORDINARY = 2.0**12
"""A weight or scale from which on a model has to show that its logits are numbers; those of real models are smaller."""
MODELS = ("model*.safetensors", "pytorch_model*.bin")
"""Patterns of the names of files with the weights of a model."""
SCALES = ("weight_scale", "scales")
"""Endings of the names of scales."""


def structure(
    model: QuantizedFolder, original: Shapes | None = None, listener: Listener = silent
) -> tuple[list[Check], float]:
    """Check all that can be checked without running the model; the checks, and the true bits per weight.

    Every tensor is read. ``original`` holds the shapes that the tensors must have, by their names in a model
    that is not quantized.
    """
    reading, linears = _Reading(model), (*model.linears, *model.stacks)
    names = (*linears, *model.passed)
    for done, name in enumerate(names):
        listener(Progress("verify", done, len(names), name, peak_memory()))
        if done < len(linears):
            reading.read(name)
        else:
            reading.passed(name, whole=True)
    listener(Progress("verify", len(names), len(names), "all tensors", peak_memory()))
    checks = [_once(model), complete(model, original), reading.numbers(), reading.on_disk()]
    return [*checks, *reading.as_decided()], reading.bits_per_weight


def require_sound(folder: Path, original: Shapes, client: Check | None = None) -> str:
    """Check a folder that has just been written: names, shapes and scales, not codes; the findings in a line.

    ``client`` says whether it loads, if that was tried. Raises OutputError if a check fails: nobody is to load what is
    silently broken.
    """
    model = QuantizedFolder.open(folder)
    reading = _Reading(model)
    for name in (*model.linears, *model.stacks):
        reading.glance(name)
    for name in model.passed:
        reading.passed(name, whole=False)
    checks = [complete(model, original, by_config=False), reading.numbers()]
    if model.format is not None:
        checks.append(_once(model))
    return published_only_if([*checks, *([] if client is None else [client])])


def is_ordinary(folder: Path) -> bool:
    """Whether a folder loads and runs for all that its names and shapes tell, so that its client need not be asked.

    Its config.json has only ordinary keys and values of an architecture that is described, and no scale and no weight
    in full precision is so large that a forward pass could leave float32, if the model is small enough to be run.
    """
    checkpoint = Checkpoint.open(folder)
    config = {key: value for key, value in checkpoint.config.items() if key != CONFIG}
    architecture = architecture_of(str(config.get("model_type")))
    if architecture is None or plain_decoder(config, architecture) is None:
        return False
    if checkpoint.total_bytes > MOST_BYTES * SMALL:
        return True  # it would not be run
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    floating = [name for name, entry in entries.items() if entry.dtype.is_floating_point and entry.elements]
    values = (values for name in floating for values in _looked_at(checkpoint, name))
    return all(bool((some.abs() < EXTRAORDINARY).all()) for some in values)


def published_only_if(checks: Sequence[Check]) -> str:
    """The findings of checks, in a line. Raises OutputError if one failed."""
    failed = [check for check in checks if check.passed is False]
    if failed:
        failures = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise OutputError(
            f"what was written is not sound, and is not published: {failures}. This is a fault of Bitwright or of the "
            "disk; begin anew with --restart, and report it if it happens again"
        )
    return "; ".join(check.found for check in checks)


class _Reading:
    """Linears read one by one: their numbers, their bits, and whether they are as they were written."""

    def __init__(self, model: QuantizedFolder) -> None:
        self.model, self.account = model, read_account(model.folder)
        self.decided = {} if self.account is None else self.account.digests
        self.ours = self.account is not None and bool(self.account.blocks)
        self.wrong, self.unlike = list[str](), list[str]()
        self.true_bits = self.stored_bits = self.weights = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight that the linears read so far need."""
        return self.true_bits / max(1, self.weights)

    def read(self, name: str) -> None:
        """Read one linear, or the slices of a stack."""
        parts = self.model.slices(name) if name in self.model.stacks else [self.model.read(name)]
        self.true_bits += self._needed(name, parts)
        self.stored_bits += 8 * sum(self.model.checkpoint.nbytes(tensor) for tensor in self.model.stored(name))
        self.weights += sum(part.codes.numel() for part in parts)
        self.wrong += [f"{name}: {what}" for part in parts for what in _wrong(part, self.ours)]
        if self.decided and self.model.digest(name) != self.decided.get(name.removesuffix(".weight")):
            self.unlike.append(name)

    def _needed(self, name: str, parts: Sequence[QTensor]) -> int:
        """The bits that the format stores a linear in."""
        assert self.model.format is not None
        whole, part = self.model.shape(name), parts[0]
        outliers = sum(0 if weight.outlier_index is None else weight.outlier_index.numel() for weight in parts)
        return self.model.format.stored_bits(whole, Scheme(part.grid, part.tile), part.scale.dtype, outliers)

    def glance(self, name: str) -> None:
        """Read what lies beside a linear's codes."""
        checkpoint, stored = self.model.checkpoint, self.model.stored(name)
        if not min(self.model.shape(name)) or not all(checkpoint.nbytes(tensor) for tensor in stored):
            self.wrong.append(f"{name}: is empty")
        for tensor in (tensor for tensor in stored if checkpoint.entry(tensor).dtype.is_floating_point):
            values = checkpoint.read(tensor)
            if not values.isfinite().all():
                self.wrong.append(f"{tensor}: NaN or infinite")
            elif tensor.endswith(SCALES) and self.ours and self._unsigned(name) and (values < 0).any():
                self.wrong.append(f"{tensor}: negative")

    def passed(self, name: str, whole: bool) -> None:
        """Read a tensor that is not quantized; if it is large, and not to be read ``whole``, only some places."""
        if not _is_finite(self.model.checkpoint, name, whole):
            self.wrong.append(f"{name}: NaN or infinite")

    def numbers(self) -> Check:
        """Check that shapes fit, that scales are finite and not zero, and that other tensors are finite."""
        return Check("scales and shapes", not self.wrong, first(self.wrong) or "scales finite, shapes fit")

    def on_disk(self) -> Check:
        """Check that the linears take no more on disk than they need, and that the files hold nothing but tensors."""
        checkpoint = self.model.checkpoint
        files = {checkpoint.file(name) for name in checkpoint.names}
        on_disk, held = sum(path.stat().st_size for path in files), checkpoint.total_bytes
        stored = self.stored_bits / max(1, self.weights)
        summary = f"{stored:.3f} bits per weight stored, {self.bits_per_weight:.3f} needed; {on_disk:,} bytes in files"
        strays = {path.name for pattern in MODELS for path in checkpoint.folder.glob(pattern)} - {f.name for f in files}
        if strays:
            return Check("size on disk", False, f"{min(strays)} lies beside the weights, and none of them is in it")
        fits = stored <= self.bits_per_weight * OVERHEAD + SMALL_LINEARS
        passed = fits and on_disk - held <= HEADERS * held + 2**20 * len(files)
        return Check("size on disk", passed, summary if passed else f"{summary}, of which tensors are {held:,}")

    def as_decided(self) -> Iterator[Check]:
        """Check that linears have the bytes that bitwright.json records, and that config.json has not changed since.

        Yields no check if nothing was recorded.
        """
        meaning = edited(self.model, self.account)
        if (self.model.folder / ACCOUNT).exists() and self.account is None:
            yield Check("as decided", False, f"{ACCOUNT} cannot be read, and what was decided cannot be told")
        if self.decided or meaning:
            linears = len(self.model.linears) + len(self.model.stacks)
            unlike = [f"{name} is not what bitwright.json says was written" for name in self.unlike]
            wrong = meaning or first(unlike)
            yield Check("as decided", not wrong, wrong or f"{linears} linears byte for byte as they were written")

    def _unsigned(self, name: str) -> bool:
        return self.model.described is not None and not self.model.described.grid_of(name).signed_scale


def _is_finite(checkpoint: Checkpoint, name: str, whole: bool) -> bool:
    entry = checkpoint.entry(name)
    if not entry.dtype.is_floating_point or not entry.elements:
        return True
    if whole or entry.nbytes <= WHOLE_BYTES:
        return checkpoint.is_finite(name)
    return all(bool(values.isfinite().all()) for values in _looked_at(checkpoint, name))


def _looked_at(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """Yield a tensor in float32; of a large one, some rows from all over it."""
    entry = checkpoint.entry(name)
    if entry.nbytes <= WHOLE_BYTES:
        yield checkpoint.read(name).float()
        return
    rows = entry.shape[0]
    few = max(1, rows * (WHOLE_BYTES // SAMPLES) // entry.nbytes)
    for start in sorted({(rows - few) * at // (SAMPLES - 1) for at in range(SAMPLES)}):
        yield checkpoint.read_slice(name, start, start + few).float()


def _wrong(part: QTensor, ours: bool) -> Iterator[str]:
    """The faults in the numbers of a weight, in words.

    On a grid without signs some tools (AutoRound) still give a group a negative scale to spend the extra code of a
    symmetric grid on the other side; Bitwright does not, and nobody gives one to every group.
    """
    negative = part.scale < 0
    if not part.scale.isfinite().all():
        yield "a scale is NaN or infinite"
    elif (part.scale == 0).any():
        yield "a scale is zero"
    elif not part.grid.signed_scale and bool(negative.any() if ours else negative.all()):
        yield f"{int(negative.sum())} of {negative.numel()} scales are negative, on a grid without signs"
    if part.outlier_value is not None and not part.outlier_value.isfinite().all():
        yield "an outlier is NaN or infinite"
    if part.outlier_index is not None and part.outlier_index.numel():
        index = part.outlier_index
        if int(index.min()) < 0 or int(index.max()) >= part.codes.numel():
            yield "an outlier lies outside of the weight"


def _once(model: QuantizedFolder) -> Check:
    """Check that no weight is there twice, quantized and in full precision."""
    linears, double = len(model.linears) + len(model.stacks), twice(model)
    summary = f"{linears} linears, each once" if linears else "no quantized linear at all"
    if double:
        summary = f"{double[0]} is quantized, and there in full precision too"
    return Check("no duplicates", bool(linears) and not double, summary)
