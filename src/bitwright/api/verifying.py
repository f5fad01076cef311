"""verify(): check that a quantized folder or file, from any tool, is what it claims to be."""

from pathlib import Path

from bitwright.core.progress import Listener, silent
from bitwright.formats import file_format_of
from bitwright.model.source import find_folder
from bitwright.verification.file import verify_file
from bitwright.verification.findings import Verification
from bitwright.verification.folder import verify_folder


def verify(
    folder: Path | str, against: Path | str | None = None, *, logits: bool = True, listener: Listener = silent
) -> Verification:
    """Check a quantized folder, or an engine's own file (gguf, mlc).

    Checked are every quantized linear of a folder and its size on disk. With ``logits``, transformers also loads the
    folder, and its logits are compared with our own decoding of the codes. If transformers does not know the
    architecture, nothing can be computed, and the check says so.

    ``against`` is the original; for a file, it may be the quantized folder that the file was made of. All of its
    tensors must be there, quantized or as they were, and the errors of weights and logits against it are measured. If
    the weights tell nothing and ``logits`` is False, the check of weights is not passed.

    Raises CheckpointError for a folder or a file that cannot be read at all, and for an original of another model.
    """
    original = None if against is None else find_folder(Path(against))
    if (format := file_format_of(Path(folder))) is not None:
        return verify_file(format, Path(folder), original, logits, listener)
    return verify_folder(find_folder(Path(folder)), original, logits, listener)
