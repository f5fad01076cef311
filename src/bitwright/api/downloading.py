"""download(): fetch a model of the Hugging Face hub into the local cache."""

from pathlib import Path

from bitwright.core.progress import Listener, silent
from bitwright.model import hub


def download(model: Path | str, *, listener: Listener = silent) -> Path:
    """Fetch a model of the Hugging Face hub, unless it is in the local cache, and return its folder there.

    A local folder is returned as it is. Of all functions, this alone asks the network for a model; the others take the
    name of a model that is in the cache. Only config.json, safetensors, the tokenizer's and processors' files, chat
    templates and the licence are fetched. Raises CheckpointError.
    """
    path = Path(model)
    if path.exists() or not hub.is_name(path):
        return path
    name = path.as_posix()
    return hub.cached(name) or hub.download(name, listener)
