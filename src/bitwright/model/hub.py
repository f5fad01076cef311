"""Models of the Hugging Face hub: found in the local cache by their names, and fetched into it only on request.

``download`` is the only function of this file that asks the network. Only what Bitwright reads or copies is fetched: no
code, no pickled weights, no weights in other formats.
"""

from pathlib import Path
from threading import Lock
from typing import Any

from bitwright.checkpoint.layout import CONFIG, INDEX
from bitwright.checkpoint.sidecar_files import COPIED
from bitwright.core.errors import CheckpointError
from bitwright.core.progress import Listener, Progress

WEIGHTS = "*.safetensors"
NEEDED = (CONFIG, WEIGHTS, INDEX)
"""Without these, what the cache holds is no model."""
FETCHED = (*NEEDED, *COPIED)
LEFT_OUT = (f"*/{WEIGHTS}", "consolidated*", "original/*", "*.py", "*.bin", "*.pt", "*.pth")
"""Patterns of files that are left out though those of ``FETCHED`` fit: weights for other engines, code, pickles."""


def is_name(path: Path) -> bool:
    """Whether a path could be the name of a model of the hub: ``Qwen/Qwen3-0.6B``, ``gpt2``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(path.as_posix())
    except HFValidationError:
        return False
    return True


def cached(name: str) -> Path | None:
    """The folder of the newest snapshot of a model in the local cache; None if it is not there, or not whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, local_files_only=True, allow_patterns=list(NEEDED), ignore_patterns=list(LEFT_OUT)
        )
    except (OSError, ValueError):  # huggingface_hub derives its errors from these
        return None
    return Path(folder) if any(Path(folder).glob(WEIGHTS)) else None


def download(name: str, listener: Listener) -> Path:
    """Fetch a model into the local cache, and return its folder there. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise CheckpointError(
            f"{name} is not in the cache of the Hugging Face hub, or only a part of it, and HF_HUB_OFFLINE forbids to "
            "download it; unset that, or name a local folder"
        )
    try:
        folder = snapshot_download(
            name, allow_patterns=list(FETCHED), ignore_patterns=list(LEFT_OUT), tqdm_class=_reporting(listener)
        )
    except Exception as error:  # of the network, of the hub, of the disk
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} cannot be downloaded from the Hugging Face hub: {type(error).__name__}: {reason}. Is the name "
            "spelled right, is the network there? A model that is private or gated needs hf auth login"
        ) from error
    if not any(Path(folder).glob(WEIGHTS)):
        raise CheckpointError(
            f"{name} has no {WEIGHTS} on the Hugging Face hub, and Bitwright reads no other weights; is there another "
            "repository of this model?"
        )
    return Path(folder)


def _reporting(listener: Listener) -> Any:
    """The class of progress bars for huggingface_hub: it shows nothing, and tells the listener of bytes."""
    from huggingface_hub import utils

    bar: Any = utils
    lock, most = Lock(), {"done": 0, "total": 0}

    class Reporting(bar.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.bytes, self.done = kwargs.get("unit") == "B", kwargs.get("initial") or 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            if not self.bytes:
                return
            with lock:  # files are fetched by several threads
                self.done += int(n or 0)
                most["done"] = max(most["done"], self.done)
                most["total"] = max(most["total"], int(self.total or 0), most["done"])
                listener(Progress("download", most["done"], most["total"], "bytes"))

    return Reporting
