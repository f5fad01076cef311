"""verify(): whether a quantized folder or file is what it claims to be, whoever wrote it."""

from pathlib import Path

from bitwright.core.progress import Listener, silent
from bitwright.formats import file_format_of
from bitwright.verification.file import verify_file
from bitwright.verification.findings import Verification
from bitwright.verification.folder import verify_folder


def verify(
    folder: Path | str, against: Path | str | None = None, *, logits: bool = True, listener: Listener = silent
) -> Verification:
    """Check a quantized folder, or an engine's own file (gguf, mlc).

    Of a folder: every quantized linear, what it takes on disk, and, with ``logits``, what the folder computes when
    transformers loads it, beside our own decoding of its codes.

    Of an architecture that transformers does not know, nothing can be computed, and the check says so.

    ``against`` is the original: its tensors must all be there, quantized or as they were, and how far weights and
    logits are from it is measured; if its weights tell nothing and logits are left out, the check of weights is not
    passed. A file's may also be the quantized folder that it was made of. Raises
    CheckpointError for a folder or a file that cannot be read at all, and for an original of another model.
    """
    original = None if against is None else Path(against)
    if (format := file_format_of(Path(folder))) is not None:
        return verify_file(format, Path(folder), original, logits, listener)
    return verify_folder(Path(folder), original, logits, listener)
